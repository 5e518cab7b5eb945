"""The file of a sweep: grids, lists, names of runs, mistakes, bundled sweeps, what shares a pass."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import DistillConfig, recipes
from pipeline.evaluation.figures import FIGURES
from pipeline.evaluation.tasks import TASKS
from pipeline.sweeps.file import SweepFile, find_sweep, make_plan, read_plan
from pipeline.sweeps.jobs import Member
from pipeline.sweeps.run import shared_passes
from singer.errors import UserError
from singer.objectives import OBJECTIVES


def names(**tree: Any) -> list[str]:
    return [run.name for run in make_plan(tree).runs]


def test_grid() -> None:
    plan = make_plan({
        "base": "tinyimagenet-ti-to-w96",
        "grid": {"refiner": ["none", "fit"], "distill.lr": ["1e-3", 0.01], "distill.seed": [0, 1]},
    })  # fmt: skip
    assert [run.name for run in plan.runs][:3] == [
        "refiner-none_lr-0.001_seed-0",
        "refiner-none_lr-0.001_seed-1",
        "refiner-none_lr-0.01_seed-0",
    ]
    first, *_, last = plan.runs
    assert len(plan.runs) == 8 and first.label == "refiner-none_lr-0.001"
    assert (first.config.student.dim, first.config.distill.lr, first.refiner) == (96, 0.001, None)
    assert (last.config.distill.lr, last.config.distill.seed) == (0.01, 1)
    assert last.refiner == "gated-adapter-standardize" and [*plan.refiners] == ["gated-adapter-standardize"]
    assert last.changes == {"refiner": "fit", "distill.lr": 0.01, "distill.seed": 1}


def test_list_and_grid() -> None:
    tree: dict[str, Any] = {
        "runs": [{"name": "raw", "set": {"refiner": "none"}}, {"set": {"refine.cleaner": "clip", "refine.rank": 8}}],
        "grid": {"distill.seed": [0, 1]},
    }
    listed = ["raw_seed-0", "raw_seed-1", "cleaner-clip_rank-8_seed-0", "cleaner-clip_rank-8_seed-1"]
    assert names(**tree) == listed
    plan = make_plan(tree)
    assert [run.label for run in plan.runs] == ["raw", "raw", "cleaner-clip_rank-8", "cleaner-clip_rank-8"]
    assert [*plan.refiners] == ["clip-standardize_rank-8"]
    # More values and more runs give no run another name.
    tree["grid"]["distill.seed"].append(2)
    tree["runs"].append({"name": "more"})
    assert set(listed) < set(names(**tree))


def test_names_that_need_more() -> None:
    assert names(grid={"refine.seed": [1], "distill.seed": [2]}) == ["refine.seed-1_distill.seed-2"]
    assert names(grid={"distill.blocks": [[8, 11], None]}) == ["blocks-8-11", "blocks-none"]
    same = names(grid={"student.name": ["a/b", "a_b"]})
    assert all(re.fullmatch("name-a-b-[0-9a-f]{6}", name) for name in same) and len(set(same)) == 2
    (long,) = names(grid={"student.name": ["x" * 200]})
    assert len(long) == 80


def test_joint_training_fits_no_refiner() -> None:
    (run,) = make_plan({"runs": [{"name": "j", "set": {"distill.joint": True}}]}).runs
    assert run.refiner is None and "refine.rank" in run.settings()


@pytest.mark.parametrize("base", ["demo", {"student": {"dim": 48, "depth": 4, "heads": 3}}])
def test_another_student_leaves_the_base_its_shape(base: object) -> None:
    vit, other = make_plan({"base": base, "grid": {"student.name": ["vit", "vit_tiny_patch16_224"]}}).runs
    assert vit.config.student.dim == 48 and other.config.student.dim is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "it has neither grid nor runs"),
        ([], "it has neither grid nor runs"),
        ("x", "it: input should be"),
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'?"),
        ({"runs": [{"nmae": "a"}]}, "unknown key 'runs.0.nmae'; did you mean 'name'?"),
        (
            {"runs": [{"name": "a/b"}]},
            "runs.0.name: a name has letters, digits and . _ + - and begins with a letter or a digit, got",
        ),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs are called a"),
        ({"base": "demmo", "runs": [{}]}, "base: no file demmo, nor a recipe among"),
        ({"base": [1], "runs": [{}]}, "base takes a recipe's name, or sections"),
        ({"base": {"distill": {"epoch": 1}}, "runs": [{}]}, "did you mean 'distill.epochs'?"),
        ({"grid": {"distill.lrr": [1]}}, "unknown key 'distill.lrr'; did you mean 'distill.lr'?"),
        ({"grid": {"distil.lr": [1]}}, "unknown key 'distil'; did you mean 'distill'?"),
        ({"grid": {"objectiv": ["mse"]}}, "unknown key 'objectiv'; did you mean 'distill.objective'?"),
        ({"grid": {"refner": ["none"]}}, "did you mean 'refiner'?"),
        ({"grid": {"refiner": ["clip"]}}, "refiner is none or fit, not 'clip'"),
        ({"grid": {"teacher.name": ["a"]}}, "teacher.name belongs to the cache"),
        ({"grid": {"distill.lr": 0.1}}, "grid.distill.lr: input should be a valid list"),
        ({"grid": {"distill.lr": []}}, "grid.distill.lr: list should have at least 1 item"),
        ({"grid": {"distill.lr": [-1]}}, "distill.lr: input should be greater than 0"),
        ({"grid": {"distill.seed": [0, 0]}}, "seed-0 have the same configuration"),
        ({"grid": {"refiner": ["none"], "refine.rank": [4, 8]}}, "have the same configuration"),
        ({"grid": {"distill.seed": [0]}, "runs": [{"set": {"distill.seed": 1}}]}, "set by grid and by a run"),
        ({"runs": [{}], "probes": ["flow"]}, "probes.0: no such probe; known: classification, segmentation"),
        ({"runs": [{}], "rank_by": "miou"}, "rank_by: no figure 'miou' among those of its probes"),
    ],
)
def test_mistakes_in_the_file(tree: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        read_plan(file)
    assert message in str(error.value) and str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "runs", "refiners"),
    [("tinyimagenet-methods", 72, 14), ("tinyimagenet-ablations", 13, 11), ("field", 99, 2), ("field-teachers", 24, 2)],
)
def test_bundled_sweeps(name: str, runs: int, refiners: int) -> None:
    plan = read_plan(find_sweep(name))
    assert (len(plan.runs), len(plan.refiners)) == (runs, refiners)
    assert name not in recipes()
    with pytest.raises(UserError, match="nor a bundled sweep among field, field-teachers, tinyimagenet-ablations"):
        find_sweep("none")


def test_the_field_has_every_objective() -> None:
    """A new one joins by an entry; texts are not among what the sweep's teacher has. All search the same rates."""
    files = [SweepFile.model_validate(yaml.safe_load(find_sweep(f).read_text())) for f in ("field", "field-teachers")]
    given = [entry.set.get("distill.objective", "mse") for file in files for entry in file.runs]
    tried = {name for one in given for name in DistillConfig(objective=one).objectives}
    assert tried == {*OBJECTIVES} - {"zero-shot"}
    assert files[0].grid == files[1].grid and [*files[0].grid] == ["distill.lr"]


def test_every_task_has_figures() -> None:
    assert set(FIGURES) == set(TASKS)
    plan = make_plan({"runs": [{}], "probes": ["segmentation", "classification"]})
    assert plan.rank_by == "classification.linear.mean_patch.top1"
    assert make_plan({"runs": [{}], "probes": ["segmentation"]}).rank_by == "segmentation.miou"


def test_passes_are_shared_where_seeds_let_them() -> None:
    runs = [{"set": {"distill.lr": lr}} for lr in (1, 2, 3)]
    plan = make_plan({"together": 2, "grid": {"distill.seed": [0, 1]}, "runs": runs})
    members = [Member(r.name, r.config) for r in plan.runs]
    passes = shared_passes(members, plan.together)
    assert [[m.config.distill.seed for m in p] for p in passes] == [[0, 0], [1, 1], [0], [1]]
    assert sorted(m.name for p in passes for m in p) == sorted(m.name for m in members)
