"""The best epoch on held-out images, early ends, and learning rates by block."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import RESNET, tree_bytes, world_config
from torch import Tensor, nn

from pipeline.cache import Cache
from pipeline.stages.distill import distill, fan_out
from pipeline.students.new import new_student
from pipeline.training import trainer
from pipeline.training.batch import Loader
from pipeline.training.distilling import runs
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.optimisers import decay_groups
from pipeline.training.run_log import read_log
from pipeline.training.student_run import StudentRun
from singer.errors import UserError

WEIGHTS = "student/model.safetensors"
# Of each epoch: the second is the best, and the fourth ends a patience of two.
LOSSES = (3.0, 1.0, 2.0, 4.0, 0.5)
SETS = ["distill.epochs=5", "distill.batch_size=64", "distill.holdout=0.1", "distill.lr=3e-3"]


class Told:
    """Stands in for the losses on held-out images, and keeps what the student was after each epoch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: int = 0) -> None:
        self.students: list[dict[str, Tensor]] = []
        measure = trainer.measure

        def told(held_out: Loader, student_runs: list[StudentRun], device: torch.device) -> list[dict[str, object]]:
            if dies and len(self.students) == dies:
                raise KeyboardInterrupt
            found = measure(held_out, student_runs, device)
            first = student_runs[0]
            model = first.student.model if first.ema is None else first.ema.module
            self.students.append({name: x.clone() for name, x in model.state_dict().items()})
            # The optimiser has done two steps an epoch.
            return [
                line | {"held_out_loss": LOSSES[run.steps // 2 - 1]}
                for run, line in zip(student_runs, found, strict=True)
            ]

        monkeypatch.setattr(trainer, "measure", told)


def test_chance_in_held_out_losses_does_not_depend_on_others(world: Path, tmp_path: Path) -> None:
    """An objective that draws masks draws the same for a student alone as for one that shares the pass."""
    config = world_config(world, *SETS, "distill.epochs=2", "distill.objective=vitkd")
    specs = [StudentSpec(config, tmp_path / name, None) for name in ("first", "second")]
    fan_out(specs, world / "cache")
    distill(config, world / "cache", tmp_path / "alone")
    found = [
        [line["held_out_loss"] for line in read_log(tmp_path / name / "log.jsonl") if "held_out_loss" in line]
        for name in ("first", "second", "alone")
    ]
    assert found[0] == found[1] == found[2] and len({*found[0]}) == 2


@pytest.mark.parametrize("ema", [pytest.param("null", marks=pytest.mark.slow), "0.5"])
def test_the_best_epoch_is_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: str) -> None:
    told = Told(monkeypatch)
    sets = [*SETS, "distill.keep=best", "distill.patience=2", f"distill.ema={ema}"]
    run = distill(world_config(world, *sets), world / "cache", tmp_path / "run", world / "adapters")
    assert (run.kept_epoch, run.steps, len(told.students)) == (2, 8, 4)
    stored = safetensors.torch.load_file(run.run / WEIGHTS)
    assert all(torch.equal(stored[name], x) for name, x in told.students[1].items())
    assert not torch.equal(stored["blocks.0.mlp.fc1.weight"], told.students[3]["blocks.0.mlp.fc1.weight"])


def test_the_average_is_what_is_measured(world: Path, tmp_path: Path) -> None:
    """Of a student with a moving average, the average; training is the same."""
    # The average is a copy of the student for two steps, so that a student that did not get its own weights back would
    # train from other ones in the third epoch.
    plain = [*SETS, "distill.objective=labels", "distill.epochs=3"]
    losses = {}
    for name, given in (("moving", [*plain, "distill.ema=0.999999999"]), ("plain", plain)):
        distill(world_config(world, *given), world / "cache", tmp_path / name)
        lines = [line for line in read_log(tmp_path / name / "log.jsonl") if "held_out_loss" in line]
        losses[name] = [line["held_out_loss"] for line in lines], [line["loss"] for line in lines]
    assert losses["moving"][1] == losses["plain"][1]  # training does not notice
    assert losses["moving"][0][-1] != losses["plain"][0][-1]


@pytest.mark.parametrize(
    "dies", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param("stored", marks=pytest.mark.slow)]
)
def test_it_resumes_exactly(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int | str) -> None:
    """From before the best epoch, from after it, and from an early end after which nothing was stored."""
    sets = [*SETS, "distill.keep=best", "distill.patience=2", "distill.layer_decay=0.5", "distill.ema=0.5"]
    config = world_config(world, *sets)
    with monkeypatch.context() as patch:
        Told(patch)
        uninterrupted = distill(config, world / "cache", tmp_path / "whole", world / "adapters")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Told(patch, dies if isinstance(dies, int) else 0)
        if dies == "stored":
            patch.setattr(runs, "store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        distill(config, world / "cache", tmp_path / "part", world / "adapters")
    told = Told(monkeypatch)
    resumed = distill(config, world / "cache", tmp_path / "part", world / "adapters", mode="resume")
    assert (resumed.kept_epoch, resumed.steps) == (2, 8) and resumed.loss == uninterrupted.loss
    assert len(told.students) == (0 if dies == "stored" else 4 - int(dies))
    whole, part = (
        tree_bytes(tmp_path / name, "run.json", "provenance.json", "log.jsonl") for name in ("whole", "part")
    )
    assert whole == part


@pytest.mark.slow
def test_one_of_several_students_ends_early(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other goes on, and both are as they would be alone."""
    Told(monkeypatch)
    specs = [
        StudentSpec(world_config(world, *SETS, f"distill.patience={patience}"), tmp_path / f"{patience}")
        for patience in (2, "null")
    ]
    ended, whole = fan_out(specs, world / "cache")
    assert (ended.steps, whole.steps) == (8, 10) and ended.kept_epoch is None
    for spec in specs:
        alone = distill(spec.config, world / "cache", tmp_path / "alone" / spec.out.name)
        assert (alone.run / WEIGHTS).read_bytes() == (spec.out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("given", ["keep=best", "patience=3"])
def test_nothing_is_held_out(world: Path, given: str) -> None:
    with pytest.raises(UserError, match=r"about the loss on held-out images; .*--set distill.holdout=0.02"):
        world_config(world, f"distill.{given}")


def test_rates_fall_from_block_to_block(world: Path) -> None:
    """By the decay from the last block down to the embedding; what is not the student has the whole rate."""
    student = new_student(world_config(world).student, 32)
    targets = Targets(Cache(world / "cache"), None, student, torch.device("cpu"))
    branch = TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1}, "linear"))
    model = Distiller(student, [branch])
    names = {id(p): name for name, p in model.named_parameters()}
    scales, decays = {}, {}
    for group in decay_groups(model, 0.1, 0.5):
        scales |= {names[id(p)]: group.get("lr_scale", 1.0) for p in group["params"]}
        decays |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    wanted = {"student.pos_embed": 0.5**3, "student.patch_embed.proj.weight": 0.5**3, "student.cls_token": 0.5**3}
    wanted |= {f"student.blocks.{b}.attn.qkv.weight": 0.5 ** (2 - b) for b in range(3)} | {"projectors.2.weight": 1.0}
    assert {name: scales[name] for name in wanted} == wanted
    plain = {names[id(p)]: g["weight_decay"] for g in decay_groups(model, 0.1) for p in g["params"]}
    assert decays == plain
    maps = new_student(world_config(world, *RESNET).student, 32)
    assert min(group["lr_scale"] for group in decay_groups(nn.ModuleDict({"student": maps.model}), 0.1, 0.5)) < 0.5
    with pytest.raises(UserError, match="a Linear has no order of layers; set it to 1"):
        decay_groups(nn.ModuleDict({"student": nn.Linear(2, 2)}), 0.1, 0.5)
