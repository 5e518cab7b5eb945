"""What a student gets if distill.projector and distill.token_share are not given: the best recipe that fits it."""

from pathlib import Path

import pytest
import torch
from conftest import RESNET, WIDTH, world_config

from pipeline.cache import Cache
from pipeline.config import Config
from pipeline.models.backbone import Backbone
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from singer.projectors import Ladder, ProjectorSpec

DEFAULTS = ("distill.projector=null", "distill.token_share=null", "distill.epochs=1")
NARROW = ("student.dim=4", "student.mlp_ratio=0.5", "student.patch_size=4")


def told(capsys: pytest.CaptureFixture[str]) -> tuple[str, bool]:
    """The projector that was told, and whether the student saw a half of its patches."""
    found = capsys.readouterr()
    lines = (found.out + found.err).splitlines()
    (projector,) = (line.split(": ")[-1] for line in lines if "projector (distill.projector): " in line)
    return projector, any("the student sees 50 % of its patches in the first 75 % of the steps" in x for x in lines)


def config(world: Path, *sets: str) -> Config:
    return world_config(world, *DEFAULTS, *sets)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        # The ladder of a student as wide as its teacher multiplies less than the student does.
        (("student.dim=24",), ("ladder", True)),
        # One of a student with few hidden units and a sixth of its width multiplies more.
        ((*NARROW,), ("linear", True)),
        ((*NARROW, "distill.projector=ladder"), ("ladder", True)),
        (("student.dim=24", "distill.projector=mlp", "distill.token_share=1"), ("mlp", False)),
        (("student.dim=24", "distill.whole_share=1"), ("ladder", False)),
        (("student.dim=24", "distill.joint=true"), ("linear", False)),
        (("student.dim=24", "distill.objective={mse: 1, gram: 1}"), ("ladder", False)),
        (("student.dim=24", "distill.objective=labels"), ("ladder", False)),
        (RESNET, ("linear", False)),
    ],
)
def test_defaults_fit_the_student(
    world: Path,
    tmp_path: Path,
    sets: tuple[str, ...],
    expected: tuple[str, bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    distill(config(world, *sets), world / "cache", tmp_path / "run")
    assert told(capsys) == expected


def test_all_patches_of_a_sampled_cache(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student must see those that were stored."""
    cache_teacher(config(world, "cache.token_share=0.5"), str(world / "train" / "*.tar"), tmp_path / "cache")
    capsys.readouterr()
    distill(config(world, "student.dim=24"), tmp_path / "cache", tmp_path / "run")
    assert told(capsys) == ("ladder", False)


def test_the_loss_of_a_run_with_defaults_chooses_images(world: Path, tmp_path: Path) -> None:
    """Its projectors are built again for that."""
    whole = distill(config(world, "student.dim=24"), world / "cache", tmp_path / "whole")
    chosen = ("distill.share=0.5", "distill.share_by=loss", f"distill.share_run={tmp_path / 'whole'}")
    half = distill(config(world, "student.dim=24", *chosen), world / "cache", tmp_path / "half")
    assert half.steps < whole.steps


def branch(world: Path, student: Backbone, *blocks: int) -> TeacherBranch:
    targets = Targets(Cache(world / "cache"), None, student, torch.device("cpu"))
    return TeacherBranch(student, dict(zip(blocks, (1, 2), strict=False)), targets, Teaching({"mse": 1.0}))


@pytest.mark.parametrize(
    ("width", "hidden", "wanted"), [(4, 0.5, "linear"), (24, 0.5, "linear"), (12, 4, "ladder"), (24, 4, "ladder")]
)
def test_a_ladder_multiplies_no_more_than_the_student(world: Path, width: int, hidden: float, wanted: str) -> None:
    """The matrices that a patch meets are counted."""
    sets = (*NARROW, f"student.dim={width}", f"student.mlp_ratio={hidden}")
    student = new_student(world_config(world, *sets).student, 32)
    specs = [ProjectorSpec((width,) * read, WIDTH, 1) for read in (2, 3)]
    counted = sum(p.numel() for spec in specs for p in Ladder(spec).patches.parameters() if p.ndim == 2)
    assert counted == sum(map(Ladder.multiplications, specs))
    assert (counted <= sum(p.numel() for p in student.model.parameters())) == (wanted == "ladder")
    assert branch(world, student, 2, 3).projector == wanted
