"""Changes of low rank: the start, what is trained and what stays, what is stored, and what is refused."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import block_output, make_vit, world_config
from torch import nn

from pipeline.cache import Cache
from pipeline.config import StudentConfig, load_config
from pipeline.models.loading import load_saved
from pipeline.runtime.devices import make_accelerator
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.students.start import TeacherWeights, start_student
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.student_run import StudentRun
from singer.backbones import count_parameters
from singer.errors import UserError
from singer.lora import train_low_rank, with_changes
from singer.selection import select_weights

LORA = ("student.dim=24", "student.init=teacher", "student.lora=2")
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def test_a_model_starts_as_it_is() -> None:
    """Bit for bit; only as many weights are trained as changes of this rank have, and those of no matrix."""
    model = make_vit(depth=2).model
    before, weights, outputs = model.state_dict(), count_parameters(model), block_output(model, 1)
    before = {name: x.clone() for name, x in before.items()}
    train_low_rank(model, 3)
    assert torch.equal(block_output(model, 1), outputs)
    state = with_changes(model.state_dict())
    assert state.keys() == before.keys() and all(torch.equal(state[name], x) for name, x in before.items())
    matrices = [before[f"blocks.0.{name}"] for name in MATRICES]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == weights - 2 * sum(x.numel() for x in matrices) + 2 * 3 * sum(sum(x.shape) for x in matrices)


def test_a_change_is_added_in_full_precision() -> None:
    layer = nn.Linear(6, 8)
    model = nn.Module()
    model.blocks = nn.ModuleList([layer])
    weight = layer.weight.detach().clone()
    train_low_rank(model, 2)
    change = dict(model.named_parameters())
    up, down = (change[f"blocks.0.parametrizations.weight.0.{name}"] for name in ("up", "down"))
    with torch.no_grad():
        up.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        found = layer.weight.detach()
    torch.testing.assert_close(found, weight + up.detach() @ down.detach())
    assert torch.equal(with_changes(model.state_dict())["blocks.0.weight"], found)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["distill.ema=0.5", "distill.accumulate=2", "distill.mask_share=0.5"],
        [
            "student.checkpointing=true",
            "distill.objective={mse: 1, minilm: 1}",
            "distill.layer_decay=0.7",
            "distill.optimizer=adamw",
        ],
    ],
    ids=["muon", "average", "adamw"],
)
def test_a_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sets: list[str]
) -> None:
    """The frozen matrices stay bit for bit, and all else moves; a plain model is stored, which is the trained one."""
    student_runs, finish = [], StudentRun.finish

    def noted(self: StudentRun, *args: object) -> None:
        student_runs.append(self)
        finish(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StudentRun, "finish", noted)
    config = world_config(world, *LORA, *sets)
    result = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    start = select_weights(load_saved(world / "teacher").model, new_student(config.student, 32).model)
    (student_run,) = student_runs
    trained = student_run.student.model if student_run.ema is None else student_run.ema.module
    state = trained.state_dict()
    stored = timm.create_model(f"local-dir:{tmp_path / 'run' / 'student'}", pretrained=True).eval()
    assert torch.equal(block_output(stored, 2), block_output(trained.eval(), 2))
    found = stored.state_dict()
    assert found.keys() == start.keys() and result.parameters == count_parameters(stored)
    for name, before in start.items():
        change = found[name] - before
        if name.startswith("blocks.") and name.endswith(MATRICES):
            assert torch.equal(state[f"{name.removesuffix('.weight')}.parametrizations.weight.original"], before)
            sizes = torch.linalg.svdvals(change)
            assert sizes[1] > 1e3 * sizes[2]  # of rank 2
        else:  # the norm comes after the last block that is compared
            assert change.any() == (not name.startswith("norm."))
    trainable = sum(p.numel() for p in student_run.student.model.parameters() if p.requires_grad)
    said = " ".join(capsys.readouterr().err.split())
    assert f"student.lora: {trainable:,} weights are trained of a student that has {result.parameters:,}" in said


def test_only_weights_that_are_named_have_changes(world: Path, tmp_path: Path) -> None:
    config = world_config(world, *LORA, "distill.trained=[blocks.1.attn.qkv, blocks.2.mlp.fc1.weight]")
    sources = open_teachers(config.distill, world / "cache", None)
    model = NewStudent(StudentSpec(config, tmp_path / "run"), sources, make_accelerator("no")).student.model
    changes = [f"{name}.parametrizations.weight.0" for name in ("blocks.1.attn.qkv", "blocks.2.mlp.fc1")]
    expected = {"blocks.1.attn.qkv.bias", *(f"{name}.{own}" for name in changes for own in ("up", "down"))}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert sum("parametrizations" in name for name in model.state_dict()) == 6


def test_refusals(world: Path) -> None:
    """The remedies work as they are printed."""
    for given, wrong, remedies in (
        ("student.init=random", "random weights", ("student.init=teacher", "student.lora=null")),
        ("student.exit=lift", "a lift exit starts from random weights", ("student.lora=null",)),
    ):
        with pytest.raises(UserError, match=f"student.lora: {wrong}") as refused:
            load_config(sets=["student.lora=4", given])
        for remedy in remedies:
            assert f"--set {remedy}" in str(refused.value)
            load_config(sets=["student.lora=4", given, remedy])
    load_config(sets=["student.lora=4", "student.init=random", "student.pretrained=true"])

    cache = Cache(world / "cache")
    t = cache.manifest.teacher
    weights = TeacherWeights(cache.teacher_config(), t.architecture, t.model_args, t.weights)
    wide = new_student(world_config(world, "student.dim=48").student, 32)
    remedy = "or start from random weights: --set student.init=random --set student.lora=null"
    with pytest.raises(UserError, match=f"it has 24 channels and the student 48; {remedy}"):
        start_student(wide, StudentConfig(init="auto", lora=4), weights)
    load_config(sets=["student.lora=4", "student.init=random", "student.lora=null"])

    model = make_vit().model
    with pytest.raises(UserError, match=r"student.lora 25 is larger than 24, .*; the most is --set student.lora=24"):
        train_low_rank(model, 25)
    train_low_rank(model, 24)
    for name in ("resnet18", "efficientnet_b0"):
        with pytest.raises(UserError, match=r"no matrix in blocks of this \w+ would be trained; do without it: --set"):
            train_low_rank(timm.create_model(name), 2)
