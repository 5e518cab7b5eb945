"""How the student's tokens come to the teacher's width: projectors, and exits that stay in the student."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import make_vit, seeded, world_config
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import load_config
from pipeline.models.backbone import Backbone
from pipeline.models.loading import load_saved
from pipeline.stages.distill import distill
from pipeline.stages.export import export
from pipeline.students.new import new_student
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.projectors import PROJECTORS, ProjectorSpec
from singer.selection import select_weights


def dense(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def test_projectors_compute_what_their_papers_say() -> None:
    tokens = [torch.randn(2, 5, d, generator=torch.Generator().manual_seed(seeded(1))) for d in (6, 8)]
    spec = ProjectorSpec((6, 8), 10, 1)
    for name in ("linear", "mlp"):
        project = PROJECTORS[name](spec)
        state = project.state_dict()
        found = project(tokens[1])
        if name == "linear":
            wanted = tokens[1] @ state["weight"].T + state["bias"]
        else:
            hidden = dense(state, "layers.0", tokens[1])
            hidden = (hidden - hidden.mean(-1, keepdim=True)) / (
                hidden.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
            assert hidden.shape[-1] == 40
            wanted = dense(state, "layers.3", F.gelu(hidden))
        torch.testing.assert_close(found, wanted)
    ladder = PROJECTORS["ladder"](spec)
    state, found = ladder.state_dict(), ladder(*tokens)
    for part, rows in (("cls", slice(0, 1)), ("patches", slice(1, 5))):
        rungs = [
            dense(state, f"{part}.{n}.2", F.gelu(dense(state, f"{part}.{n}.0", x[:, rows])))
            for n, x in enumerate(tokens)
        ]
        torch.testing.assert_close(found[:, rows], rungs[0] + rungs[1])
    assert state["patches.0.0.weight"].shape == (6, 6) and state["patches.1.0.weight"].shape == (32, 8)
    assert float(state["cls.1.0.weight"].std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("projector", [pytest.param("mlp", marks=pytest.mark.slow), "ladder"])
def test_projectors_train(world: Path, tmp_path: Path, projector: str) -> None:
    """A ladder reads blocks that no teacher block is matched to, and its gradient reaches all of them."""
    sets = [f"distill.projector={projector}", "distill.blocks=[3]", "distill.epochs=1"]
    run = distill(world_config(world, *sets), world / "cache", tmp_path / "run", world / "adapters")
    stored = safetensors.torch.load_file(run.run / "projectors.safetensors")
    rungs = {name.split(".")[2] for name in stored if ".patches." in name}
    assert rungs == ({"0", "1", "2"} if projector == "ladder" else set())
    assert list(run.teachers[0].matching) == [3]
    if projector == "ladder":
        own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
        config = world_config(world, *sets, "student.name=test_resnet", *own)
        with pytest.raises(UserError, match="have different grids; take another projector"):
            distill(config, world / "cache", tmp_path / "maps")


def exit_of(kind: str, *more: str) -> Backbone:
    sets = [f"student.{key}" for key in ("dim=12", "depth=3", "heads=2", "patch_size=8", f"exit={kind}", *more)]
    return new_student(load_config(sets=sets).student, 32, width=24)


@pytest.mark.parametrize("kind", ["lift", "wide"])
def test_exits(kind: str) -> None:
    """Lift is a linear map after the last block; a wide last block gets its tokens through a linear map and a norm."""
    student = exit_of(kind)
    assert [width for width, _ in student.layout] == [12, 12, 24] and student.width == 24
    model = student.model.eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seeded(2)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seeded(3))) * 0.1)
        outputs = block_outputs(model, images, [1, 2])
        body: nn.Module = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12 if kind == "lift" else 24, depth=3,
            num_heads=2 if kind == "lift" else 4, num_classes=0,
        )  # fmt: skip
        last = {n.removeprefix("blocks.2."): p for n, p in model.state_dict().items() if n.startswith("blocks.2.")}
        block = body.get_submodule("blocks.2").eval()
        block.load_state_dict({n: p for n, p in last.items() if not n.startswith(("lift", "widen"))})
        if kind == "lift":
            wanted = dense(last, "lift", block(outputs[1]))
        else:
            x = F.layer_norm(
                outputs[1] @ last["widen.weight"].T, (24,), last["widen_norm.weight"], last["widen_norm.bias"], 1e-6
            )
            wanted = block(x)
        torch.testing.assert_close(outputs[2], wanted)
        pooled = F.layer_norm(wanted, (24,), model.norm.weight, model.norm.bias, 1e-6)[:, 0]
        torch.testing.assert_close(model(images), pooled)


@pytest.mark.parametrize("kind", ["lift", pytest.param("wide", marks=pytest.mark.slow)])
def test_a_student_with_an_exit_is_trained_kept_and_exported(world: Path, tmp_path: Path, kind: str) -> None:
    """Its last block is compared as it is; it starts from the teacher; what is written loads as the same model."""
    sets = [f"student.exit={kind}", "student.init=teacher", "distill.epochs=1"]
    config = world_config(world, *sets)
    run = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    stored = safetensors.torch.load_file(run.run / "projectors.safetensors")
    assert {name: tuple(x.shape) for name, x in stored.items()} == {"2.weight": (24, 12), "2.bias": (24,)}
    student = load_saved(run.student)
    assert student.architecture == "vit_exit" and student.width == 24
    assert load_saved(run.student, image_size=48).grid == (6, 6)
    if kind == "wide":
        assert export(config, run.run, tmp_path / "pt", "torch-export").max_difference < 1e-4
        return
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        result = export(config, run.run, tmp_path / "timm", "timm")
        written = timm.create_model(f"local-dir:{result.export}", pretrained=True).eval()
        assert torch.equal(written(images), student.model(images))
    assert "import pipeline.models.student_exits" in (result.export / "README.md").read_text()
    with pytest.raises(
        UserError, match=r"--to hf is not for students with student\.exit; take timm, onnx or torch-export"
    ):
        export(config, run.run, tmp_path / "hf", "hf")


def test_a_wide_last_block_starts_from_the_teachers_whole_block() -> None:
    teacher, student = make_vit(num_heads=4).model, exit_of("wide").model
    state = select_weights(teacher, student)
    for name in ("attn.qkv.weight", "mlp.fc1.weight", "norm2.bias"):
        assert torch.equal(state[f"blocks.2.{name}"], teacher.state_dict()[f"blocks.2.{name}"])
    assert torch.equal(state["blocks.2.widen.weight"], student.state_dict()["blocks.2.widen.weight"])
    wider = exit_of("lift", "exit_width=48").model
    assert torch.equal(select_weights(teacher, wider)["norm.weight"], wider.state_dict()["norm.weight"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["exit_width=8"], "8 channels are fewer than the student's 12"),
        (["exit_width=25"], "25 channels are not a multiple of the student's 2 heads"),
        (
            ["name=mod:net", "dim=null", "depth=null", "heads=null"],
            "is for Vision Transformers of timm, and not for mod:net",
        ),
        (
            ["name=test_resnet", "dim=null", "depth=null", "heads=null", "patch_size=null"],
            "no Vision Transformer of timm",
        ),
    ],
)
def test_what_has_no_exit(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exit_of("lift", *more)
