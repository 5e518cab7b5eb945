"""The teacher's features depend on the configuration alone, whatever else in the process uses Accelerate."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import seeded, tree_bytes, world_config

from pipeline.cache.extract import Extractor
from pipeline.data.views import normalise
from pipeline.stages import cache_teacher as stage
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.finetune import finetune
from pipeline.stages.refine import refine
from pipeline.stages.verify import verify
from pipeline.teachers.teacher import load_teacher
from singer.backbones import block_outputs
from singer.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def new_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(("precision", "others"), [("no", "bf16"), ("bf16", "no"), ("fp16", "bf16"), ("auto", "bf16")])
def test_features_are_those_of_accelerates_autocast(world: Path, precision: str, others: str) -> None:
    """To the bit, and without an Accelerator or with one of another precision. On a CPU, fp16 and auto are float32."""
    config = world_config(world, f"cache.precision={precision}")
    backbone = load_teacher(config.teacher)
    pixels = torch.randint(0, 256, (5, 32, 32, 3), generator=torch.Generator().manual_seed(seeded(3))).byte()
    same = Accelerator(mixed_precision="no" if precision == "auto" else precision)
    with torch.inference_mode(), same.autocast():
        images = normalise(pixels, backbone.mean, backbone.std)
        wanted = block_outputs(backbone.model, images, (1, 3))
    for has_others in (False, True):
        AcceleratorState._reset_state()
        if has_others:
            Accelerator(mixed_precision=others)
        extract = Extractor(config, backbone, CPU)
        found = extract.features(pixels, (1, 3))
        assert all(x.dtype == torch.float32 and torch.equal(x, wanted[b].float()) for b, x in found.items())
        assert extract.teacher.precision == ("no" if precision == "auto" else precision)
        assert bool(AcceleratorState._shared_state) == has_others
    with torch.inference_mode():
        assert torch.equal(wanted[3], block_outputs(backbone.model, images, (3,))[3]) == (precision != "bf16")


def test_a_callers_accelerator_is_left_alone(world: Path, tmp_path: Path) -> None:
    callers = Accelerator(mixed_precision="bf16")
    place = tmp_path / "cache"
    cache_teacher(world_config(world, "cache.precision=no"), str(world / "train" / "*.tar"), place)
    assert verify(world_config(world), place, live=True, sample=4).whole
    refine(world_config(world, "refine.steps=1"), place, tmp_path / "refiner")
    with callers.autocast():
        assert callers.mixed_precision == "bf16" and torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu") and AcceleratorState().mixed_precision == "bf16"
    differing = ("provenance.json", "config.yaml")
    assert tree_bytes(place, *differing) == tree_bytes(world / "cache", *differing)


def test_a_callers_accelerator_survives_training(world: Path, tmp_path: Path) -> None:
    """Its precision and its accumulation stay, it still trains, and others can be made."""
    callers = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimiser = callers.prepare(torch.nn.Linear(2, 1), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    config = world_config(world, "distill.epochs=1", "distill.precision=no", "finetune.epochs=1", "finetune.workers=1")
    run = distill(config, world / "cache", tmp_path / "run").run
    with pytest.raises(UserError, match="unknown 'nothing'"):
        distill(world_config(world, "distill.trackers=[nothing]"), world / "cache", tmp_path / "none")
    finetune(config, run, str(world / "train" / "*.tar"), tmp_path / "tuned")
    assert (callers.mixed_precision, callers.gradient_accumulation_steps) == ("bf16", 2)
    assert AcceleratorState().mixed_precision == "bf16"
    for count in (1, 2):
        with callers.accumulate(model), callers.autocast():
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            callers.backward(model(torch.ones(3, 2)).sum())
            optimiser.step()
            assert callers.sync_gradients == (count == 2)
    assert Accelerator().mixed_precision == "bf16"


def test_batch_sizes_are_tried_with_copies(world: Path) -> None:
    """Each of them is a pass of the teacher."""
    config = world_config(world, "teacher.image_size=[32,56]", "teacher.copies=3")
    extract, passes = Extractor(config, load_teacher(config.teacher), CPU), list[int]()
    extract.backbone.model.patch_embed.register_forward_hook(lambda _, images, __: passes.append(len(images[0])))
    assert {len(x) for x in extract.empty_batch(2).values()} == {2} and passes == [2] * 3


def test_all_gpus_are_for_one_process(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = stage.this_process()
    monkeypatch.setattr(process, "num_processes", 2)
    config = world_config(world, "teacher.offload=auto")
    with pytest.raises(UserError, match="teacher.offload auto takes all GPUs in one process; start one"):
        cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
