"""Sweeps: shared refiners, skipping and resuming, what is recorded and ranked."""

import csv
import errno
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import shards, tree_bytes, world_config
from sweeping import RUNS, run, run_whole, students, write

import cli
import pipeline.sweeps.jobs as work
from pipeline.cache import Cache
from pipeline.evaluation.figures import in_percent
from pipeline.runtime.error_kinds import DefectsFound
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import fan_out
from pipeline.sweeps.file import make_plan
from pipeline.sweeps.leaderboard import Leaderboard
from pipeline.sweeps.run import sweep
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.run_directory import DistillResult
from singer.errors import UserError


@pytest.fixture(scope="module")
def file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(world, tmp_path_factory.mktemp("file") / "s.yaml", runs=RUNS)


@pytest.fixture(scope="module")
def whole(world: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep in this process; tests only read it."""
    return run_whole(world, file, tmp_path_factory.mktemp("whole") / "out")


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


def test_a_refiner_of_another_variant_brings_its_blocks(world: Path, tmp_path: Path) -> None:
    """Runs are checked against the teacher that their refiner reads, not the first of the cache."""
    place = tmp_path / "cache"
    shutil.copytree(world / "cache", place)
    half = world_config(world, "cache.precision=bf16", "cache.blocks=[1,3]")
    variant = cache_teacher(half, shards(world), place, "append").variant
    sets = ("refine.cleaner=clip", f"refine.teacher={variant}", "distill.blocks=[1]", "distill.epochs=1")
    file = write(world, tmp_path / "s.yaml", *sets, runs=[{"name": "clip"}])
    assert sweep(file, place, tmp_path / "sweep").failed == {}


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
