"""One small model of each family of timm, from its images to a student: what a model can do decides, not its class."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_with, seeded

from pipeline.cache.reader import Cache
from pipeline.config import StudentConfig
from pipeline.data import ImageFile
from pipeline.data.views import apply_view, normalise
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.loading import create_model, load_saved
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.inspect import inspect
from pipeline.stages.refine import refine
from pipeline.students.new import new_student
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.suffix import TeacherSuffix, find_suffix

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 2}
PATCHES = SMALL | {"patch_size": 8}


@dataclass(frozen=True)
class Family:
    """A small model. prefix, cls: its prefix tokens, and whether the first is CLS; suffix: whether it has one."""

    name: str
    size: int
    args: dict[str, Any]
    prefix: int = 0
    cls: bool = False
    suffix: bool = False
    slow: bool = False


FAMILIES = [
    Family("vit_small_patch16_dinov3", 32, PATCHES, 5, True, True),
    Family("eva02_tiny_patch14_224", 56, SMALL, 1, True, True),
    Family("vit_pe_core_tiny_patch16_384", 32, PATCHES, 1, True, True, slow=True),
    Family("vit_small_patch16_rope_mixed_224", 32, PATCHES, 1, True, True),
    Family("beit_base_patch16_224", 32, PATCHES, 1, True, True),
    Family("vit_srelpos_small_patch16_224", 32, PATCHES, 0, False, True),
    Family("naflexvit_base_patch16_gap", 64, SMALL, 4, False, True),
    Family("deit_tiny_distilled_patch16_224", 32, PATCHES, 2, True, True),
    Family("vit_base_patch16_siglip_224", 32, PATCHES, 0, False, True),
    Family("cait_xxs24_224", 32, SMALL),
    Family("xcit_nano_12_p8_224", 32, SMALL, slow=True),
    Family("samvit_base_patch16", 64, SMALL),
    Family("convnext_atto", 64, {}),
    Family("resnet18", 64, {}, slow=True),
    Family("mobilenetv4_conv_small", 64, {}),
    Family("repvit_m1", 64, {}, slow=True),
    Family("fastvit_t8", 64, {}, slow=True),
    Family("efficientvit_b0", 64, {}, slow=True),
    Family("swin_tiny_patch4_window7_224", 224, {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
           slow=True),
    Family("hiera_tiny_224", 224, {}, slow=True),
    Family("mvitv2_tiny", 224, {}, slow=True),
    Family("tiny_vit_5m_224", 224, {}, slow=True),
    Family("maxvit_nano_rw_256", 256, {}, slow=True),
    Family("volo_d1_224", 224, {}, slow=True),
]  # fmt: skip


def _families(*suffix: bool) -> list[object]:
    """Return the families with or without a suffix; those that take long are marked."""
    wanted = [f for f in FAMILIES if f.suffix in suffix]
    return [pytest.param(f, id=f.name, marks=[pytest.mark.slow] if f.slow else []) for f in wanted]


def build(family: Family, **args: Any) -> Backbone:
    torch.manual_seed(seeded(0))
    model = create_model(family.name, family.size, family.args | args, None, False, "model")
    model.model.eval()
    return model


@pytest.mark.parametrize("family", _families(True, False))
def test_from_images_to_a_student(family: Family, few_shards: str, tmp_path: Path) -> None:
    teacher = build(family)
    assert (teacher.prefix, teacher.has_cls, teacher.image_size) == (family.prefix, family.cls, family.size)
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    sets = [f"teacher.name=local-dir:{tmp_path / 'teacher'}", f"teacher.image_size={family.size}"]
    config = config_with(
        *sets, "cache.blocks=[-2,-1]", "cache.codec=float16", "refine.cleaner=neighbour", "distill.epochs=1"
    )
    cache_teacher(config, few_shards, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert cache.has_suffix == family.suffix

    # The cached features are those of the live model, each block with its own width and grid.
    index = cache.index
    with ImageFile(index.images) as files:
        pixels = [apply_view(files.read(n), index.record_view(n), family.size) for n in range(3)]
    images = normalise(torch.from_numpy(np.stack(pixels)), teacher.mean, teacher.std)
    live = block_outputs(load_saved(tmp_path / "teacher").model.eval(), images, cache.blocks)
    stored = cache.features(np.arange(3), torch.device("cpu"))
    for block in cache.blocks:
        width, (rows, columns) = teacher.layout[block]
        assert stored[block].shape == (3, family.prefix + rows * columns, width)
        torch.testing.assert_close(stored[block], live[block], atol=2e-3 * float(live[block].abs().max()), rtol=1e-3)

    refine(config, tmp_path / "cache", tmp_path / "refiner")
    run = distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner")
    assert np.isfinite(run.loss)
    found = inspect(config, tmp_path / "cache", tmp_path / "refiner")
    assert all(bool(figures["drift"]) == family.suffix for figures in found.blocks.values())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_srelpos_small_patch16_224"])
def test_a_share_of_the_patches_of_a_teacher_with_positions_in_its_blocks(
    name: str, few_shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its blocks cannot read a share, so a fit that can do without them does, and another says so."""
    (family,) = (f for f in FAMILIES if f.name == name)
    teacher = build(family)
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    sets = [f"teacher.name=local-dir:{tmp_path / 'teacher'}", f"teacher.image_size={family.size}"]
    sets += ["cache.blocks=[-2,-1]", "cache.token_share=0.5", "refine.steps=3"]
    cache_teacher(config_with(*sets), few_shards, tmp_path / "cache")
    assert Cache(tmp_path / "cache").has_suffix
    refine(config_with(*sets, "refine.cleaner=gated-adapter"), tmp_path / "cache", tmp_path / "refiner")
    assert "next blocks need all patches" in capfd.readouterr().err
    for cleaner in ("adapter", "projector"):
        with pytest.raises(
            UserError, match=f"refine.cleaner {cleaner}: the teacher's next blocks need all patches, and"
        ):
            refine(config_with(*sets, f"refine.cleaner={cleaner}"), tmp_path / "cache", tmp_path / "other")
    with pytest.raises(UserError, match="use basis weights or artifact, and a number as rank"):
        refine(
            config_with(*sets, "refine.cleaner=gated-adapter", "refine.basis=artifact-aware"),
            tmp_path / "cache",
            tmp_path / "other",
        )


@pytest.mark.parametrize("family", [p for p in _families(False) if not p.values[0].args])  # type: ignore[attr-defined]
def test_as_a_student(family: Family, world: Path, tmp_path: Path) -> None:
    sets = [f"student.name={family.name}", f"student.image_size={family.size}", "distill.epochs=1"]
    # Two steps on few images are enough.
    sets += ["distill.share=0.2", "distill.batch_size=10"]
    config = config_with(f"teacher.name=local-dir:{world / 'teacher'}", *sets, "student.dim=null", "student.depth=null",
                         "student.heads=null", "student.patch_size=null")  # fmt: skip
    run = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert np.isfinite(run.loss)
    probe = evaluate(config, tmp_path / "run", str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    assert set(probe.linear)


@pytest.mark.parametrize("family", _families(True))
def test_suffix_gives_the_models_own_output(family: Family) -> None:
    """At every block, to 1e-5; find_suffix itself tries one block, and less exactly."""
    teacher = build(family, num_classes=5)
    images = torch.randn(2, 3, family.size, family.size, generator=torch.Generator().manual_seed(seeded(1)))
    with torch.no_grad():
        for block in range(4):
            state = find_suffix(teacher.model, teacher.architecture, teacher.model_args, block, family.size)
            assert state is not None
            suffix = TeacherSuffix(teacher.architecture, teacher.model_args, block, state)
            outputs = block_outputs(teacher.model, images, [block, 3] if block < 3 else [3])
            torch.testing.assert_close(suffix.last_output(outputs[block], block), outputs[3], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                suffix.logits(outputs[block], block), teacher.model(images), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.cls and f.prefix > 1], ids=lambda f: f.name)
def test_cls_is_told_from_registers(family: Family) -> None:
    """Swapping the parameters of CLS and another prefix token swaps them in the output, so CLS is where it is read."""
    teacher = build(family)
    images = torch.randn(1, 3, family.size, family.size, generator=torch.Generator().manual_seed(seeded(1)))
    other = next(x for x in (getattr(teacher.model, n, None) for n in ("dist_token", "reg_token")) if x is not None)
    with torch.no_grad():
        before = block_outputs(teacher.model, images, [0])[0]
        cls = teacher.model.cls_token.clone()
        teacher.model.cls_token.copy_(other[:, :1])
        other[:, :1] = cls
        if teacher.model.pos_embed is not None and teacher.model.pos_embed.shape[1] == before.shape[1]:
            teacher.model.pos_embed[:, :2] = teacher.model.pos_embed[:, :2].flip(1)
        after = block_outputs(teacher.model, images, [0])[0]
    torch.testing.assert_close(after[:, :2], before[:, :2].flip(1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 0], before[:, 1], atol=1e-3)


def test_a_student_keeps_its_class_token() -> None:
    student = new_student(StudentConfig(name="vit_small_patch16_dinov3", image_size=32), 32)
    assert student.has_cls and student.prefix == 5 and student.grid == (2, 2)


def test_what_needs_a_suffix_says_so(few_shards: str, tmp_path: Path) -> None:
    teacher = build(next(f for f in FAMILIES if f.name == "convnext_atto"))
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    config = config_with(f"teacher.name=local-dir:{tmp_path / 'teacher'}", "teacher.image_size=64", "cache.blocks=[3]")
    cache_teacher(config, few_shards, tmp_path / "cache")
    with pytest.raises(
        UserError, match="convnext_atto: this teacher has no suffix .*take refine.cleaner gated-adapter with"
    ):
        refine(config, tmp_path / "cache", tmp_path / "refiner")
    without = ["refine.cleaner=gated-adapter", "refine.basis=artifact", "refine.steps=20"]
    refine(config_with(*without), tmp_path / "cache", tmp_path / "refiner")
    for objective in ("relation", "logits"):
        with pytest.raises(UserError, match="no suffix .*a distill.objective that compares tokens"):
            distill(config_with(f"distill.objective={objective}"), tmp_path / "cache", tmp_path / objective)


def test_share_of_tokens_needs_one_grid(few_shards: str, tmp_path: Path) -> None:
    teacher = build(next(f for f in FAMILIES if f.name == "convnext_atto"))
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    config = config_with(f"teacher.name=local-dir:{tmp_path / 'teacher'}", "teacher.image_size=64", "cache.blocks=[3]",
                         "cache.token_share=0.5")  # fmt: skip
    with pytest.raises(UserError, match="cache.token_share below 1 needs a teacher whose blocks have one grid"):
        cache_teacher(config, few_shards, tmp_path / "cache")


def test_shapes_are_in_the_manifest_only_where_blocks_differ(world: Path) -> None:
    assert json.loads((world / "cache" / "manifest.json").read_text())["teacher"]["shapes"] is None
