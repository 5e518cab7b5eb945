"""Adapters that learn together with the student."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_batch, world_config
from training_runs import CPU, epochs_fall

from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.training.batch import Batch
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.joint_training import new_joint
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.run_log import read_log
from singer.errors import UserError


@pytest.mark.parametrize("variant", ["official", "paper", "singer"])
def test_joint_training(world: Path, tmp_path: Path, variant: str) -> None:
    """Adapters and student together, as the paper has it; the adapters leave their start and are kept."""
    sets = ["distill.joint=true", f"refine.variant={variant}", "distill.epochs=3", "distill.lr=3e-3"]
    if variant == "singer":
        sets += ["refine.keep_weight=1", "refine.expect_weight=0.5"]
    distill(world_config(world, *sets), world / "cache", tmp_path / "run")
    assert epochs_fall(tmp_path / "run", 3)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    parts = {"mse.2", "mse.3", "outlier", "info"} | ({"keep", "expect"} if variant == "singer" else set())
    assert set(lines[0]["parts"]) == parts
    state = safetensors.torch.load_file(tmp_path / "run" / "adapters.safetensors")
    moved = [float((state[f"cleaners.{b}.down"] - state[f"cleaners.{b}.up"].T).norm()) for b in (2, 3)]
    assert min(moved) > 1e-3  # at the start they were equal, or up was zero


def test_joint_training_has_no_other_adapters(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.joint trains its own adapters; leave out --refiner"):
        distill(world_config(world, "distill.joint=true"), world / "cache", tmp_path / "run", world / "adapters")
    assert not (tmp_path / "run").exists()


def make_joint(world: Path, variant: str) -> tuple[Distiller, Batch]:
    config = world_config(world, f"refine.variant={variant}")
    cache, student = Cache(world / "cache"), new_student(config.student, 32)
    joint = new_joint(cache, config.refine, CPU)
    targets = Targets(cache, None, student, CPU)
    distiller = Distiller(student, [TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1.0}), joint)])
    shown = [Decoded(cache.features(range(8), CPU))]
    batch = make_batch(shown, 8)
    return distiller, batch


@pytest.mark.parametrize("variant", ["singer", "paper", "official"])
def test_parts_without_a_record_add_nothing(world: Path, variant: str) -> None:
    """The last batch of an epoch may leave a process nothing but filling."""
    distiller, batch = make_joint(world, variant)
    losses, _ = distiller(replace(batch, weights=torch.zeros(8)))
    assert set(losses) == set(distiller(batch)[0])
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())


def test_adapters_losses_of_parts_add_up(world: Path) -> None:
    distiller, batch = make_joint(world, "singer")
    whole, _ = distiller(batch)
    parts = [distiller(part)[0] for part in batch.split(2)]
    for name in ("outlier", "mse.2", "mse.3"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
