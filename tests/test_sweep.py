"""Sweeps: the file, shared refiners, skipping and resuming, several workers, what is recorded and ranked."""

import csv
import errno
import fcntl
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import shards, tree_bytes, world_config

import cli
import pipeline.sweeps.jobs as work
from pipeline.cache import Cache
from pipeline.config import Config, DistillConfig, recipes
from pipeline.evaluation.figures import FIGURES, in_percent
from pipeline.evaluation.tasks import TASKS
from pipeline.runtime.error_kinds import DefectsFound
from pipeline.runtime.failures import Failure
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import fan_out
from pipeline.sweeps.file import SweepFile, find_sweep, make_plan, read_plan
from pipeline.sweeps.jobs import Job, Member, SweepContext
from pipeline.sweeps.leaderboard import Leaderboard
from pipeline.sweeps.run import SweepResult, gpus, shared_passes, sweep
from pipeline.sweeps.worker import Worker
from pipeline.training.run_directory import DistillResult
from pipeline.training.runs import StudentSpec
from singer.errors import UserError
from singer.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
WEIGHTS = "student/model.safetensors"
# Two methods that share a refiner, and raw targets with two seeds.
RUNS: list[dict[str, Any]] = [
    {"name": "mse"},
    {"name": "cosine", "set": {"distill.objective": "cosine"}},
    {"name": "raw0", "set": {"refiner": "none"}},
    {"name": "raw1", "set": {"refiner": "none", "distill.seed": 1}},
]


def write(world: Path, file: Path, *sets: str, **tree: Any) -> Path:
    base = world_config(
        world, "refine.cleaner=clip", "distill.checkpoint_minutes=1e-9", "evaluate.strengths=[0.1]", *sets
    ).model_dump(mode="json")
    file.write_text(yaml.safe_dump({"base": base, **tree}))
    return file


def run(world: Path, file: Path, out: Path, *args: Any, probed: bool = False, **options: Any) -> SweepResult:
    if probed:
        options |= {"train": str(world / "train" / "*.tar"), "test": str(world / "test" / "*.tar")}
    return sweep(file, world / "cache", out, *args, **options)


def students(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in sorted((out / "runs").glob(f"*/{WEIGHTS}"))}


@pytest.fixture(scope="module")
def file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(world, tmp_path_factory.mktemp("file") / "s.yaml", runs=RUNS)


@pytest.fixture(scope="module")
def whole(world: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep in this process; tests only read it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = run(world, file, out, probed=True)
    assert (result.runs, result.done, result.failed) == (4, 4, {})
    return out


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


def test_refiner_is_shared_and_folders_are_whole(world: Path, whole: Path) -> None:
    assert [p.name for p in (whole / "refiners").iterdir()] == ["clip-standardize"]
    assert len(set(students(whole).values())) == 4
    for name in ("mse", "cosine"):
        assert json.loads((whole / "runs" / name / "inputs.json").read_text())["refiner"] is not None
    assert json.loads((whole / "runs" / "raw0" / "inputs.json").read_text())["refiner"] is None
    assert json.loads((whole / "provenance.json").read_text())["stage"] == "sweep"
    assert json.loads((whole / "inputs.json").read_text()) == {"cache": Cache(world / "cache").id}
    states = json.loads((whole / "sweep.json").read_text())["runs"]
    assert states["cosine"] == {"state": "done", "error": None, "refiner": "clip-standardize"}


def test_leaderboard(whole: Path) -> None:
    board = json.loads((whole / "leaderboard.json").read_text())
    by = board["rank_by"]
    assert by == "classification.linear.mean_patch.top1" and board["failed"] == {}
    assert sorted(tuple(row["names"]) for row in board["rows"]) == [("cosine",), ("mse",), ("raw0", "raw1")]
    means = [row["figures"][by]["mean"] for row in board["rows"]]
    (raw,) = (row for row in board["rows"] if row["name"] == "raw0")
    tops = []
    for name in ("raw0", "raw1"):
        (stored,) = (whole / "runs" / name).glob("evaluate-*.json")
        tops.append(json.loads(stored.read_text())["linear"]["mean_patch"]["top1"])
    assert raw["figures"][by]["mean"] == pytest.approx(sum(tops) / 2)
    assert raw["figures"][by]["std"] == pytest.approx(abs(tops[0] - tops[1]) / 2**0.5)
    assert raw["changes"] == {"refiner": "none"} and raw["planned"] == 2

    with (whole / "leaderboard.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row[by]) for row in rows] == pytest.approx(means)
    cells = {row["run"]: (row["refiner"], row["distill.objective"], row["seeds"]) for row in rows}
    assert cells == {"mse": ("fit", "mse", "1"), "cosine": ("fit", "cosine", "1"), "raw0": ("none", "mse", "2")}
    assert all(int(row["parameters"]) > 0 and float(row["loss"]) > 0 for row in rows)


def test_figures_are_shown_in_percent() -> None:
    assert in_percent("depth.bins.delta1", 0.875) == 87.5 and in_percent("segmentation.miou", 24.2) == 24.2


def test_ranks(whole: Path, tmp_path: Path) -> None:
    """By the figure that was asked for and no other; equals share a rank, and who lacks it has none."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    tops = {"mse": (90, 50), "cosine": (60, 60), "raw0": (None, 70), "raw1": (None, 40)}
    files = {}
    for name, (cls, patches) in tops.items():
        (file,) = (out / "runs" / name).glob("evaluate-*.json")
        files[name] = {"classification": file}
        result = json.loads(file.read_text())
        result["linear"] = {"mean_patch": {"top1": patches}} | ({"cls": {"top1": cls}} if cls else {})
        result["knn"] = {"cls": {"top1": 12.5}}
        file.write_text(json.dumps(result))
    tree = yaml.safe_load((out / "sweep.yaml").read_text())

    def ranks(figure: str) -> list[tuple[int | None, str]]:
        plan = make_plan(tree | {"rank_by": figure})
        return [(row.rank, row.name) for row in Leaderboard(plan, out, files, ranked=True).rows()]

    assert ranks("classification.linear.mean_patch.top1") == [(1, "cosine"), (2, "raw0"), (3, "mse")]
    assert ranks("classification.linear.cls.top1") == [(1, "mse"), (2, "cosine"), (None, "raw0")]
    assert ranks("classification.knn.cls.top1") == [(1, "mse"), (1, "cosine"), (1, "raw0")]
    board = Leaderboard(make_plan(tree), out, files, ranked=True)
    assert board.summary()[1] | {"seconds": 0, "loss": 0, "images/s": 0, "parameters": 0} == {
        "rank": 2, "run": "raw0", "seeds": 2, "linear.cls.top1": None, "linear.mean_patch.top1": 55.0,
        "knn.cls.top1": 12.5, "knn.mean_patch.top1": None, "std": pytest.approx(30 / 2**0.5),
        "parameters": 0, "images/s": 0, "seconds": 0, "loss": 0,
    }  # fmt: skip
    board.write({})
    page = (out / "leaderboard.html").read_text()
    assert ">55.0 ± 21.2<" in page and "k-NN<br>mean patch" not in page


def test_page_needs_no_other_file(whole: Path) -> None:
    page = (whole / "leaderboard.html").read_text()
    assert "Ranked by linear, mean patch, top-1" in page and "4 of 4 runs are done" in page
    assert page.count("<tr>") == 1 + 3 and " ± " in page and 'name="viewport"' in page and "color-scheme" in page
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)|@import""", page)
    assert links == [("data:,", "")]


def test_done_runs_are_skipped_and_changed_ones_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "s.yaml"
    first = run(world, write(world, file, "distill.epochs=1", runs=RUNS[1:3]), out)
    assert first.rank_by is None and "rank" not in first.leaderboard[0]
    before = tree_bytes(out / "runs")
    with pytest.raises(UserError, match="exists; continue it with --resume, replace it with --overwrite"):
        run(world, file, out)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(work, "fan_out", never)
        patch.setattr(work, "refine", never)
        assert run(world, file, out, "resume").done == 2
    assert tree_bytes(out / "runs") == before

    # A new run, and labelled shards: the others are not trained again, but probed.
    write(world, file, "distill.epochs=1", runs=RUNS[:3])
    assert len(run(world, file, out, "resume", probed=True).leaderboard) == 3
    after = tree_bytes(out / "runs")
    assert {k: v for k, v in after.items() if not (k.startswith("mse") or "evaluate-" in k)} == before

    changed = [dict(RUNS[1], set={"distill.objective": "mse"}), dict(RUNS[2], name="new")]
    messages = {
        "run cosine in .*out was started with distill.objective cosine, not mse": changed,
        "run raw0 in .* was started with refiner none, not fit": [dict(RUNS[2], set={})],
        "run cosine in .* was started with refine.cleaner clip, not none": [
            {"name": "cosine", "set": {"distill.objective": "cosine", "refine.cleaner": "none"}}
        ],
    }
    for message, runs in messages.items():
        with pytest.raises(UserError, match=message):
            run(world, write(world, file, "distill.epochs=1", runs=runs), out, "resume")
    write(world, file, "distill.epochs=1", "refine.threshold_k=5", runs=RUNS[:2])
    with pytest.raises(UserError, match="refiner clip-standardize in .* was started with refine.threshold_k 6.0"):
        run(world, file, out, "resume")
    assert tree_bytes(out / "runs") == after


def test_a_failing_run_stops_no_other(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(specs: list[StudentSpec], *args: Any) -> list[DistillResult]:
        if specs[0].out.name == "bad":
            raise UserError("it is 'bad'")
        return fan_out(specs, *args)

    monkeypatch.setattr(work, "fan_out", fails)
    runs: list[dict[str, Any]] = [
        {"name": "bad", "set": {"distill.seed": 2}},
        {"name": "worse", "set": {"refine.cleaner": "adapter", "refine.lr": 1e30}},
        {"name": "good", "set": {"refiner": "none", "distill.epochs": 1}},
    ]
    file, out = write(world, tmp_path / "s.yaml", runs=runs), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["singer", *f"sweep {file} --cache {world}/cache --out {out}".split(), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    told = capsys.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result["done"] == 1 and result["failed"]["bad"] == "it is 'bad'"
    assert result["failed"]["worse"].startswith("refiner adapter-standardize_lr-1e+30: the adapters diverged")
    last = f"error: 2 of 3 runs failed: bad, worse; their messages are in {out / 'sweep.json'}; --resume trains them"
    assert told.err.splitlines()[-1].split() == last.split()
    assert told.err.count("it is 'bad'") == told.err.count("the adapters diverged") == 1
    states = json.loads((out / "sweep.json").read_text())["runs"]
    assert [states[name]["state"] for name in ("bad", "worse", "good")] == ["failed", "failed", "done"]
    assert "<li>bad: it is &#39;bad&#39;" in (out / "leaderboard.html").read_text()

    def bursts(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of\norder")

    # Put right, only what failed is done again; and no exception at all gets past its run.
    runs[0]["set"] = {"refiner": "none", "distill.seed": 3}
    monkeypatch.setattr(work, "fan_out", bursts)
    again = run(world, write(world, file, runs=[runs[0], runs[2]]), out, "resume")
    log = out / "singer.log"
    assert again.done == 1 and again.failed == {"bad": f"defect: RuntimeError: out of order; see {log}"}
    assert again.defects == ["bad"] and "in bursts" in log.read_text()
    with pytest.raises(DefectsFound, match="1 of 2 runs failed: bad"):
        again.check()


def test_a_full_disk_ends_a_sweep(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next runs would train, and could not be stored either; nor do those of a pass train one by one."""
    passes: list[int] = []

    def full(specs: list[StudentSpec], *args: Any) -> list[DistillResult]:
        passes.append(len(specs))
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    runs = [{"name": name, "set": {"refiner": "none", "distill.seed": n}} for n, name in enumerate("ab")]
    file, out = write(world, tmp_path / "s.yaml", runs=runs), tmp_path / "out"
    words = ["singer", *f"sweep {file} --cache {world}/cache --out {out}".split()]
    monkeypatch.setattr(sys, "argv", words)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(work, "fan_out", full)
        cli.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and len(passes) == 1 and "No space left on device (x); make room there" in last
    assert last.endswith(f"then go on with: {shlex.join(words)} --resume")
    assert run(world, file, out, "resume").done == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill.objective": "msee"}, "run bad: distill.objective: unknown 'msee'"),
        ({"refine.normaliser": "nrom"}, "refiner clip-nrom: refine.normaliser: unknown 'nrom'"),
        ({"student.name": "resnet18_x"}, "run bad: student.name: timm has no model 'resnet18_x'"),
        ({"student.name": "vit", "student.dim": 25}, "run bad: student.dim 25 is not a multiple"),
        ({"student.init": "nowhere"}, "run bad: student.init: no file or folder nowhere"),
        (
            {"distill.objective": "vitkd", "distill.token_share": 0.5},
            "run bad: distill.objective vitkd needs all patches .* a share of them; set distill.token_share=1",
        ),
        ({"distill.trackers": ["foo"]}, "run bad: distill.trackers: unknown 'foo'; known: aim"),
        ({"distill.trackers": ["aim"]}, "run bad: distill.trackers: aim is not installed; pip install aim"),
        (
            {"distill.projector": "none"},
            r"run bad: distill.projector none .* the student has \d+ channels where its teacher has \d+; take another",
        ),
        ({"distill.block_weights": [1]}, "run bad: distill.block_weights: 1 weights for 2 blocks"),
        ({"distill.trained": ["nothing"]}, "run bad: distill.trained: no weights 'nothing' would be trained"),
        (
            {"distill.overlap": "other", "distill.objective": "gram"},
            "run bad: distill.overlap: objective gram does not",
        ),
        ({"distill.holdout": 0.9999}, "run bad: distill.holdout: all 100 images would be held out"),
        ({"distill.teacher_drop": 0.5}, "run bad: distill.teacher_drop is for several teachers"),
        ({"distill.teacher_weights": [1, 1]}, "run bad: distill.teacher_weights: 2 given for 1 --cache"),
        ({"distill.objective": "zero-shot"}, "run bad: distill.objective zero-shot needs distill.texts"),
        (
            {"student.dim": 48, "student.init": "teacher"},
            "run bad: student.init teacher: .* has 24 channels",
        ),
        (
            {"student.dim": 48, "student.init": "{teacher}"},
            "run bad: student.init .*: it has 24 channels",
        ),
        ({"student.lora": 10**6, "student.init": "teacher"}, "run bad: student.lora 1000000 is larger than"),
        ({"student.depth": 1}, "run bad: 2 teacher blocks cannot be matched to 1 student blocks"),
        (
            {"student.name": "selecsls42", "student.checkpointing": True},
            "run bad: student.checkpointing: selecsls42 cannot do it; set it to false",
        ),
    ],
)
def test_a_run_that_cannot_train_is_named_first(
    settings: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    if settings.get("student.init") == "{teacher}":
        settings = settings | {"student.init": str(world / "teacher")}
    file = write(world, tmp_path / "s.yaml", runs=[{"name": "good"}, {"name": "bad", "set": settings}])
    with pytest.raises(UserError, match=message):
        run(world, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_moved_are_missed_first(world: Path, tmp_path: Path) -> None:
    """A sweep whose runs are all trained does not need them."""
    folder, place = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for shard in sorted((world / "train").glob("*.tar")):
        shutil.copy(shard, folder)
    config = world_config(world, "views.pixels=none")
    cache_teacher(config, [str(tar) for tar in sorted(folder.glob("*.tar"))], place)
    folder.rename(tmp_path / "moved")
    file = write(world, tmp_path / "s.yaml", "distill.epochs=1", runs=RUNS[2:3])
    with pytest.raises(UserError, match="of the cache is gone; if it has moved, give its place with --images"):
        sweep(file, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moved = str(tmp_path / "moved" / "*.tar")
    assert sweep(file, place, tmp_path / "out", images=moved).failed == {}
    assert sweep(file, place, tmp_path / "out", "resume").failed == {}


def test_a_refiner_of_another_variant_brings_its_blocks(world: Path, tmp_path: Path) -> None:
    """Runs are checked against the teacher that their refiner reads, not the first of the cache."""
    place = tmp_path / "cache"
    shutil.copytree(world / "cache", place)
    half = world_config(world, "cache.precision=bf16", "cache.blocks=[1,3]")
    variant = cache_teacher(half, shards(world), place, "append").variant
    sets = ("refine.cleaner=clip", f"refine.teacher={variant}", "distill.blocks=[1]", "distill.epochs=1")
    file = write(world, tmp_path / "s.yaml", *sets, runs=[{"name": "clip"}])
    assert sweep(file, place, tmp_path / "sweep").failed == {}


def test_half_a_pair_of_shards_is_refused(world: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="probes need both --train and --test"):
        run(world, file, tmp_path / "out", train=str(world / "train" / "*.tar"))
    assert not (tmp_path / "out").exists()


def test_probe_images_that_are_left_out(world: Path, tmp_path: Path) -> None:
    """A sweep counts as done what was probed without them."""
    shard = tmp_path / "test.tar"
    with tarfile.open(sorted((world / "test").glob("*.tar"))[0]) as source, tarfile.open(shard, "w") as target:
        for number, member in enumerate(source.getmembers()):
            data = source.extractfile(member)
            assert data is not None
            content = data.read()
            if number == 0:
                content = content[: len(content) // 2]
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    file = write(world, tmp_path / "s.yaml", "data.on_error=skip", "distill.epochs=1", runs=RUNS[2:3])
    for mode in ("new", "resume"):
        result = run(world, file, tmp_path / "out", mode, train=str(world / "train" / "*.tar"), test=str(shard))
        assert (result.done, result.failed) == (1, {})
    assert len(json.loads((tmp_path / "out" / "leaderboard.json").read_text())["rows"]) == 1
    # What the message tells to add, works for a file that does not say it.
    plain = write(world, tmp_path / "plain.yaml", "distill.epochs=1", runs=RUNS[2:3])
    probed = {"train": str(world / "train" / "*.tar"), "test": str(shard)}
    with pytest.raises(UserError, match="leave it out with --on-error skip"):
        run(world, plain, tmp_path / "plain", **probed)
    result = run(world, plain, tmp_path / "plain", **probed, on_error="skip")
    assert (result.done, result.failed) == (1, {})
    with pytest.raises(UserError, match=r"plain.yaml: .*data.on_error"):
        run(world, plain, tmp_path / "other", **probed, on_error="perhaps")


@pytest.mark.parametrize(
    ("probe", "settings", "message"),
    [
        ("segmentation", {}, "probe segmentation of run mse: --task segmentation needs evaluate.seg_classes"),
        ("segmentation", {"evaluate.seg_classes": 3}, "has no .seg.png; every image needs one here"),
        ("depth", {}, "has no .depth.png; every image needs one here"),
        ("domain-shift", {"evaluate.class_map": "none.json"}, "evaluate.class_map: none.json: No such file"),
    ],
)
def test_probes_are_checked_before_anything_is_trained(
    world: Path, tmp_path: Path, probe: str, settings: dict[str, Any], message: str
) -> None:
    runs = [{"name": "mse", "set": settings}]
    file = write(world, tmp_path / "s.yaml", runs=runs, probes=["classification", probe])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(world, file, tmp_path / "out", probed=True)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Path, Path]:
    """(a Python whose workers wait where they have written a checkpoint, as long as this file exists, the file)."""
    python, gate = tmp_path / "python", tmp_path / "gate"
    gate.touch()
    python.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.training.checkpoint import Checkpoint\n"
        "save = Checkpoint.save\n"
        "def waits(*args, **options):\n"
        "    save(*args, **options)\n"
        f"    while Path({str(gate)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "Checkpoint.save = waits\n"
        # Given are -P, -m, the module and its arguments.
        "sys.modules.pop('pipeline.sweeps.worker', None)\n"
        "sys.argv[1:4] = []\n"
        "runpy.run_module('pipeline.sweeps.worker', run_name='__main__')\n"
    )
    python.chmod(0o755)
    return python, gate


@pytest.mark.slow
def test_two_workers_killed_and_resumed_give_the_same_students(
    world: Path, file: Path, whole: Path, tmp_path: Path, waiting: tuple[Path, Path]
) -> None:
    """kill -9 of the sweep takes its workers along; what they were at goes on, in this process."""
    out = tmp_path / "out"
    program = f"import sys; sys.executable = {str(waiting[0])!r}; import cli; cli.main()"
    command = [sys.executable, "-c", program, "sweep", file, "--cache", world / "cache", "--out", out, "--workers", 2]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    runs = out / "runs"
    try:
        while len(list(runs.glob("*/checkpoint.pt"))) < 2 and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert "on worker 0" in told and "on worker 1" in told
    assert not students(out)
    # The locks of its workers are free as soon as they are gone.
    while any(is_held(lock) for lock in runs.glob(".*.lock")):
        time.sleep(0.01)
    result = run(world, file, out, "resume")
    assert result.done == 4 and students(out) == students(whole)


def is_held(lock: Path) -> bool:
    try:
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


@pytest.mark.slow
def test_two_workers(
    world: Path,
    file: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same bytes as one, and every job done once."""
    out = tmp_path / "out"
    result = run(world, file, out, workers=2, probed=True)
    assert result.done == 4 and students(out) == students(whole)
    refiner = "refiners/clip-standardize/refiner.safetensors"
    assert (out / refiner).read_bytes() == (whole / refiner).read_bytes()
    for name in ("mse", "raw1"):
        (mine,), (theirs,) = ((o / "runs" / name).glob("evaluate-*.json") for o in (out, whole))
        mine_value, theirs_value = (json.loads(f.read_text()) | {"seconds": 0} for f in (mine, theirs))
        assert mine.name == theirs.name and mine_value == theirs_value
    jobs = [line for line in capsys.readouterr().err.splitlines() if ": on worker " in line]
    assert sorted(line.split(": on worker ")[0] for line in jobs) == [
        "cosine", "mse", "raw0", "raw1", "refiner clip-standardize",
    ]  # fmt: skip
    assert {line[-1] for line in jobs} == {"0", "1"}


def test_a_worker_that_dies_fails_its_run(
    world: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = run(world, file, tmp_path / "out", workers=2)
    died = r"its process died \(exit code 1\); see worker-\d.log"
    assert result.done == 0 and all(re.search(died, error) for error in result.failed.values())
    assert set(result.failed) == {"mse", "cosine", "raw0", "raw1"}


@pytest.mark.slow
def test_members_of_a_pass_outlive_their_worker(
    world: Path,
    file: Path,
    whole: Path,
    tmp_path: Path,
    waiting: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed with three students on it, they go on one by one, and end as if nothing had been."""
    (python, gate), out, do, killers = waiting, tmp_path / "out", Worker.do, []

    def kill(worker: Worker, names: list[str]) -> None:
        while not any((out / "runs" / name / "checkpoint.pt").exists() for name in names):
            time.sleep(0.01)
        assert worker._process is not None
        worker._process.kill()
        gate.unlink()

    def watched(self: Worker, job: Job) -> dict[str, str]:
        if len(job.members) == 3:
            killers.append(threading.Thread(target=kill, args=(self, [m.name for m in job.members]), daemon=True))
            killers[0].start()
        return do(self, job)

    monkeypatch.setattr(Worker, "do", watched)
    monkeypatch.setattr(sys, "executable", str(python))
    tree = yaml.safe_load(file.read_text())
    result = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 4}), out, workers=2)
    killers[0].join()
    assert result.failed == {} and students(out) == students(whole)
    told = capsys.readouterr().err
    assert re.search(r"its process died \(signal 9\); see worker-\d.log; they now train one by one", told)


def test_the_member_that_kills_its_worker_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "import json, os, sys\nfor line in sys.stdin:\n"
    answer += "    names = [m['name'] for m in json.loads(line).get('members', ())]\n"
    answer += "    'bad' in names and os._exit(7)\n    names and print(json.dumps({}), flush=True)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", answer], **options))
    worker = Worker(SweepContext([tmp_path], tmp_path, None, [], [], []), None, 1, tmp_path / "log")
    members = tuple(Member(name, Config()) for name in ("a", "bad", "b"))
    assert worker.do(Job("run", members)) == {"bad": Failure("its process died (exit code 7); see log", defect=True)}
    worker.kill()
    assert set(worker.do(Job("run", members[::2]))) == {"a", "b"}, "what was killed stays so"
    worker.close()


def test_one_worker_a_gpu(world: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child sees its own GPU alone, as the parent's CUDA_VISIBLE_DEVICES calls it."""
    seen: list[str] = []

    def popen(*args: Any, env: dict[str, str], **options: Any) -> None:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        run(world, file, tmp_path / "out")
    assert seen and set(seen) <= {"3", "GPU-ab"}
    assert gpus() == ["3", "GPU-ab"]


@pytest.mark.slow
def test_students_that_train_together(
    world: Path, file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one pass they are the same, and one that cannot be trained takes no other along."""
    tree = yaml.safe_load(file.read_text())
    out = tmp_path / "out"
    result = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 4}), out)
    assert result.failed == {} and students(out) == students(whole)
    tree["runs"].append({"name": "bad", "set": {"distill.seed": 1}})

    def fails(specs: list[StudentSpec], *args: Any) -> list[DistillResult]:
        if any(spec.out.name == "bad" for spec in specs):
            raise UserError("it is bad")
        return fan_out(specs, *args)

    monkeypatch.setattr(work, "fan_out", fails)
    again = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 9}), tmp_path / "again")
    assert set(again.failed) == {"bad"} and again.done == 4
    assert students(tmp_path / "again") == students(whole)


def test_passes_are_shared_where_seeds_let_them() -> None:
    runs = [{"set": {"distill.lr": lr}} for lr in (1, 2, 3)]
    plan = make_plan({"together": 2, "grid": {"distill.seed": [0, 1]}, "runs": runs})
    members = [Member(r.name, r.config) for r in plan.runs]
    passes = shared_passes(members, plan.together)
    assert [[m.config.distill.seed for m in p] for p in passes] == [[0, 0], [1, 1], [0], [1]]
    assert sorted(m.name for p in passes for m in p) == sorted(m.name for m in members)
