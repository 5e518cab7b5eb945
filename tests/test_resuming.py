"""Runs that are interrupted and continued: the same bytes, or a refusal that names what has changed."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import world_config
from training_runs import WEIGHTS, die_after

from pipeline.checks import check_command
from pipeline.config import Config, load_config
from pipeline.outputs.provenance import file_hash
from pipeline.stages.distill import distill, fan_out
from pipeline.stages.refine import refine
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.refining.stored_refiners import REFINER
from pipeline.training.run_log import read_log
from pipeline.training.student_run import StudentRun
from singer.errors import UserError

# Nothing but tokens that do not decay is trained, so that a group of the optimiser is empty.
REGISTERS = [
    "student.dim=24", "student.depth=4", "student.registers=3", "distill.projector=none", "distill.trained=[reg_token]",
]  # fmt: skip


def test_a_checkpoint_needs_no_weights_to_start_from(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a run end that starts from its own output, which the new one would replace."""
    begun, out = tmp_path / "begun", tmp_path / "run"
    distill(world_config(world, "distill.epochs=1"), world / "cache", begun)
    start = f"student.init={begun}"
    config = world_config(world, "distill.checkpoint_minutes=1e-9", start)
    with pytest.raises(UserError, match="overlaps the input"):
        distill(config, world / "cache", begun, mode="overwrite")
    with pytest.raises(UserError, match="overlaps the input"):
        check_command("distill", config, begun, "overwrite")
    distill(world_config(world, start), world / "cache", tmp_path / "whole")
    die_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", out)
    monkeypatch.undo()
    shutil.rmtree(begun)
    check_command("distill", config, out, "resume")
    distill(config, world / "cache", out, mode="resume")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="student.init: no file or folder"):
        check_command("distill", config, tmp_path / "other")


DEFAULTS = ["student.dim=24", "distill.projector=null", "distill.token_share=null"]
LORA = ["student.dim=24", "student.init=teacher", "student.lora=2", "distill.holdout=0.1", "distill.keep=best"]
WINDOWS = ["distill.read_block=4", "distill.shuffle_window=24"]


@pytest.mark.parametrize(
    ("stop_after", "sets"),
    [(3, []), (9, ["distill.mask_share=0.5"]), (9, REGISTERS), (9, DEFAULTS), (9, LORA), (9, WINDOWS)],
)
def test_resume_is_exact(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, sets: list[str]
) -> None:
    """A run that dies in some step, and goes on from its last checkpoint, ends with the same bytes."""
    distill(world_config(world, *sets), world / "cache", tmp_path / "whole", world / "adapters")
    config = world_config(world, "distill.checkpoint_minutes=1e-9", *sets)
    die_after(stop_after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", tmp_path / "part", world / "adapters")
    monkeypatch.undo()
    assert (tmp_path / "part" / "checkpoint.pt").exists() and not (tmp_path / "part" / "run.json").exists()
    with (tmp_path / "part" / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "loss": 0, "torn')
    distill(config, world / "cache", tmp_path / "part", world / "adapters", mode="resume")
    for name in (WEIGHTS, "projectors.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [[(line["step"], line["loss"]) for line in read_log(tmp_path / n / "log.jsonl")] for n in ("part", "whole")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "part" / "checkpoint.pt").exists()


def test_resume_refusals(world: Path, config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = distill(config, world / "cache", run)
    assert distill(config, world / "cache", run, mode="resume") == first
    with pytest.raises(UserError, match=r"started with distill\.lr auto, not 0\.5"):
        distill(world_config(world, "distill.lr=0.5"), world / "cache", run, mode="resume")
    with pytest.raises(UserError, match="started with another refiner;"):
        distill(config, world / "cache", run, world / "adapters", mode="resume")
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        distill(config, world / "cache", run)


def test_resume_tells_refiners_of_one_tensor_apart(world: Path, tmp_path: Path) -> None:
    """A clip and a neighbour mean of one cache differ in their kind alone."""
    for cleaner in ("clip", "neighbour"):
        config = world_config(world, f"refine.cleaner={cleaner}", "refine.normaliser=none")
        refine(config, world / "cache", tmp_path / cleaner)
    assert file_hash(tmp_path / "clip" / REFINER) == file_hash(tmp_path / "neighbour" / REFINER)
    config = world_config(world, "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run", tmp_path / "clip")
    with pytest.raises(UserError, match="started with another refiner kind;"):
        distill(config, world / "cache", tmp_path / "run", tmp_path / "neighbour", mode="resume")


def test_checkpoint_is_no_pickle_of_code(world: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    checkpoint = Checkpoint(tmp_path / "c.pt", {"model": model, "optimiser": optimiser, "scaler": None}, minutes=60)
    assert not checkpoint.due and Checkpoint(tmp_path / "c.pt", {}, minutes=0).due
    checkpoint.save(7, write=False)
    assert not checkpoint.path.exists()
    checkpoint.save(7)
    other = torch.nn.Linear(2, 2)
    fresh = {"model": other, "optimiser": torch.optim.AdamW(other.parameters())}
    again = Checkpoint(tmp_path / "c.pt", fresh, minutes=60)
    assert again.restore() == 7 and torch.equal(other.weight, model.weight)
    (tmp_path / "c.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"c\.pt is damaged, or of another version; remove it"):
        again.restore()
    assert Checkpoint(tmp_path / "none.pt", {"model": other}, 1).restore() == 0


def test_fan_out_resumes_from_different_steps(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two checkpoints, one student is an epoch ahead of the other."""
    specs = [StudentSpec(world_config(world, f"student.dim={d}"), tmp_path / f"{d}") for d in (12, 16)]
    saves, save = 0, Checkpoint.save

    def dying(self: Checkpoint, step: int, write: bool) -> None:
        nonlocal saves
        saves += 1
        if saves > 1:
            raise KeyboardInterrupt
        save(self, step, write)

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        fan_out(specs, world / "cache")
    monkeypatch.undo()
    assert [(spec.out / "checkpoint.pt").exists() for spec in specs] == [True, False]
    for spec, result in zip(specs, fan_out(specs, world / "cache", mode="resume"), strict=True):
        alone = distill(spec.config, world / "cache", tmp_path / "alone" / spec.out.name)
        assert (alone.run / WEIGHTS).read_bytes() == (result.run / WEIGHTS).read_bytes()


def test_joint_runs_are_continued_as_they_were_begun(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["distill.joint=true", "refine.variant=official"]
    # Until there is a checkpoint, settings may change, and those that are stored are those that were used.
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(StudentRun, "update", None)
        distill(world_config(world, sets[0]), world / "cache", tmp_path / "begun")
    distill(world_config(world, *sets), world / "cache", tmp_path / "begun", mode="resume")
    assert load_config(tmp_path / "begun" / "config.yaml").refine.variant == "official"
    distill(world_config(world, *sets), world / "cache", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"started with refine\.variant official, not singer"):
        distill(world_config(world, sets[0]), world / "cache", tmp_path / "run", mode="resume")
