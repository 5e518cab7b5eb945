"""`singer run`: from a folder to a student; what it chooses; that it goes on where it was killed."""

import contextlib
import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
from accelerate.commands.launch import launch_command_parser
from conftest import draw_images, run_singer, tree_bytes, world_config
from rich.console import Console

from pipeline.chains.rehearsal import rehearse
from pipeline.chains.run import RunResult, run
from pipeline.chains.split import has_to_be_packed, ranges, shards_of, split
from pipeline.config import Config, dump_config, load_config
from pipeline.data import ImageFile, list_images, resolve
from pipeline.outputs.folder import Mode
from pipeline.planning.choice import CROPS_FROM, VIEWS, Chooser, Costs
from pipeline.runtime import logs
from pipeline.runtime.devices import this_process
from pipeline.runtime.launch import launcher
from pipeline.stages.report import ReportResult
from singer.errors import UserError

COSTS = Costs(
    100.0,
    50.0,
    25.0,
    {"float16": 4e5, "int8": 2e5, "int4": 1e5, "int3": 8e4, "int2": 5e4, "int1": 3e4},
    10**8,
    False,
    (100, 200),
)
SMALL = ("refine.cleaner=neighbour", "evaluate.strengths=[0.1]", "distill.epochs=1", "views.count=1")


def chooser(*sets: str, **how: Any) -> Chooser:
    """Without stored views, unless they are asked for."""
    pixels = [] if how.pop("pixels", False) else ["views.pixels=none"]
    return Chooser(
        load_config(sets=[*sets, *pixels]), **{"images": 10_000, "probed": 0, "costs": COSTS, "free": 10**12, **how}
    )


def test_without_limits_it_is_the_papers_recipe() -> None:
    choice = chooser().choose()
    assert choice.sets["views.count"] == 5 and choice.sets["views.kind"] == "random-resized-crop"
    assert choice.sets["views.scale"] == (0.3, 1.0)  # that of the crops in docs/results.md
    assert choice.sets["distill.epochs"] == 20 and choice.sets["distill.warmup_epochs"] == 1
    assert choice.sets["cache.codec"] == "float16" and choice.bytes == 10_000 * 5 * 4e5 + 10**8
    assert choice.caching_hours == pytest.approx(50_000 * (1 / 50 + 1 / 100) / 3600)
    assert choice.training_hours == pytest.approx(10**6 * (1 / 25 + 1 / 100) / 3600)
    for short, long in ((chooser(images=1000), chooser()), (chooser(hours=20.0), chooser())):
        assert "repeat the command with --hours H" in long.choose().reasons[-1]
        assert not any("--hours" in reason for reason in short.choose().reasons)


@pytest.mark.parametrize(
    ("disk", "codec", "views"),
    [(21, "float16", 5), (11, "int8", 5), (6, "int4", 5), (1.7, "int1", 5), (1.2, "int1", 3), (0.5, "int1", 1)],
)
def test_the_disk_takes_exactness_first_and_then_views(disk: float, codec: str, views: int) -> None:
    choice = chooser(disk=int(disk * 1e9)).choose()
    assert (choice.sets["cache.codec"], choice.sets["views.count"]) == (codec, views)
    assert choice.bytes <= disk * 1e9
    more = next((n for n in reversed(VIEWS) if n > views), None)
    assert more is None or f"views {views}: {more} do not fit {disk:g} GB" in choice.reasons
    assert chooser(free=int(2 * disk * 1e9)).choose().sets["cache.codec"] == codec


@pytest.mark.parametrize("hours", [8.0, 2.0, 0.4])
def test_the_time_is_kept(hours: float) -> None:
    choice = chooser(hours=hours).choose()
    assert 0.5 * hours <= choice.hours <= hours
    assert choice.sets["distill.epochs"] >= 1 and any("time" in reason for reason in choice.reasons)


def test_the_time_of_updates_counts_and_that_which_has_gone() -> None:
    """A step of Muon takes as long for a batch of 8 as for one of 128: small batches have many steps."""
    slow = replace(COSTS, update=0.5)
    choice = chooser(images=64, costs=slow, hours=0.05).choose()
    epoch = 64 * (1 / 25 + 1 / 100) + 64 // choice.sets["distill.batch_size"] * 0.5
    assert choice.sets["views.count"] == 1 and choice.sets["distill.batch_size"] < 64
    assert choice.training_hours == pytest.approx(choice.sets["distill.epochs"] * epoch / 3600)
    assert choice.hours <= 0.05 and "all else 30 s" in choice.forecast
    epochs = [chooser(hours=1.0, spent=spent).choose().sets["distill.epochs"] for spent in (0.0, 1200.0)]
    assert epochs[1] < epochs[0]
    with pytest.raises(UserError, match="more than --hours 0.01; give --hours 0.0"):
        chooser(images=64, costs=slow, hours=0.01).choose()


def test_crops_are_stored_if_there_is_time_for_passes_over_them() -> None:
    sets = [chooser(hours=hours).choose().sets for hours in (0.4, 2.0, 8.0, 20.0)]
    seen = [(choice["views.count"], choice["views.count"] * choice["distill.epochs"]) for choice in sets]
    assert all(views == 1 or passes >= CROPS_FROM for views, passes in seen)
    assert seen[0][0] == 1 and seen[0][1] < CROPS_FROM and seen[-1] == (5, 100)
    for epochs, views, hours in ((3, 1, None), (3, 1, 8.0), (10, 5, None), (10, 5, 20.0), (30, 1, 5.0)):
        choice = chooser(f"distill.epochs={epochs}", hours=hours).choose()
        assert choice.sets["views.count"] == views and choice.sets["distill.epochs"] == epochs
        why = "views 1: the time is too short for 2" if epochs == 30 else "crops pay from 48 on"
        assert any(why in reason for reason in choice.reasons) == (views == 1)


def test_what_is_given_is_kept() -> None:
    sets = ["views.count=2", "views.flip=0.1", "cache.codec=int2", "distill.epochs=7", "distill.batch_size=33"]
    choice = chooser(*sets, "views.kind=random-resized-crop").choose()
    assert choice.sets["views.count"] == 2 and "views.flip" not in choice.sets and "views.kind" not in choice.sets
    assert choice.sets["cache.codec"] == "int2" and choice.sets["distill.epochs"] == 7
    assert "distill.batch_size" not in choice.sets and sum("given" in reason for reason in choice.reasons) == 4
    assert chooser("views.kind=center").choose().sets["views.count"] == 1


def test_views_are_stored_where_they_have_room() -> None:
    """As the student sees them, after the most exact codec and the most views; training then decodes nothing."""
    plain, stored = chooser().choose(), chooser(pixels=True).choose()
    assert (stored.sets["views.pixels"], stored.sets["views.pixel_size"]) == ("uint8", (100, 200))
    assert stored.bytes == plain.bytes + 50_000 * 3 * 100 * 200 and stored.caching_hours == plain.caching_hours
    assert stored.training_hours == pytest.approx(10**6 / 25 / 3600) and any("stored" in r for r in stored.reasons)
    assert set(stored.sets) - set(plain.sets) == {"views.pixels", "views.pixel_size"}
    # Time that is left goes into more views and epochs, and what is left of the disk decides.
    seen = [
        choice.sets["views.count"] * choice.sets["distill.epochs"]
        for choice in (chooser(hours=2.0).choose(), chooser(pixels=True, hours=2.0).choose())
    ]
    assert seen[1] > seen[0]
    small = [chooser(pixels=True, disk=disk).choose() for disk in (21 * 10**9, 23 * 10**9, 24 * 10**9)]
    assert [choice.sets["views.pixels"] for choice in small] == ["none", "none", "uint8"]
    assert all(choice.sets["cache.codec"] == "float16" for choice in small)
    # What is left open is chosen, also if somebody says so.
    said = chooser("views.pixels=auto", pixels=True).choose()
    assert said.sets["views.pixels"] == "uint8" and said.bytes == stored.bytes
    sized = chooser("views.pixels=auto", "views.pixel_size=50", pixels=True).choose()
    assert sized.sets["views.pixel_size"] == 50 and sized.bytes == plain.bytes + 50_000 * 3 * 50 * 50
    given = chooser("views.pixels=jpeg", pixels=True).choose()
    assert "views.pixels" not in given.sets and given.training_hours == stored.training_hours


def test_small_data_gets_small_batches_and_more_processes_take_less() -> None:
    assert chooser(images=40).choose().sets["distill.batch_size"] == 12
    assert chooser(images=4).choose().sets["distill.batch_size"] == 8
    assert chooser(processes=4).choose().hours == pytest.approx(chooser().choose().hours / 4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"disk": 10**8}, "the cache takes 0.4 GB even with views.count 1 and codec int1, and 0.1 GB are allowed"),
        ({"disk": 2 * 10**12}, "--disk-gb 2000: only 1e+03 GB are free there"),
        ({"hours": 0.01}, "more than --hours 0.01; give --hours 0.2"),
    ],
)
def test_what_does_not_fit_is_said_with_a_remedy_that_works(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        chooser(**how).choose()
    assert message in str(error.value)
    words = str(error.value).split()
    if "hours" in how:
        chooser(hours=float(words[words.index("give") + 2])).choose()
    elif "or more" in str(error.value):
        chooser(disk=int(float(words[words.index("give") + 2]) * 1e9)).choose()


def test_shards_are_named_in_ranges(tmp_path: Path) -> None:
    folder = tmp_path / "a{1,2}[b]7"
    folder.mkdir()
    names = ["x-0008.tar", "x-0009.tar", "x-0010.tar", "x-012.tar", "y.tar", "z9.tar", "z10.tar", "{q}.tar", "w1*.tar"]
    files = [folder / name for name in names]
    for file in files:
        file.touch()
    specs = ranges(files)
    assert len(specs) == 7 and resolve(specs) == files


def test_held_out_shards_are_the_last_tenth(world: Path, config: Config) -> None:
    parts = split(config, [f"{world / 'train'}/*.tar"])
    shards = sorted((world / "train").glob("*.tar"))
    assert resolve(parts.train) == shards[:-1] == resolve(parts.probe)
    assert resolve(parts.test) == shards[-1:] and not parts.why
    assert (parts.images, parts.probed) == (90, 100)
    one = split(config, [str(shards[0])])
    assert one.test == [] and one.images == 30 and "one shard only" in one.why


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished chain, and what it printed."""
    root = tmp_path_factory.mktemp("run")
    draw_images(root / "photos", 2, 20)
    return root, "\n".join(_run(world, root, root / "out"))


def _run(world: Path, root: Path, out: Path, *options: object) -> list[str]:
    """What `singer run` printed on stderr; it must succeed."""
    file = root / "toy.yaml"
    file.write_text(dump_config(world_config(world, *SMALL)))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(logs, "console", Console(file=said, soft_wrap=True, highlight=False))
        code = run_singer(patch, "run", root / "photos", "--out", out, "--config", file, *options)
    assert code == 0, said.getvalue()
    return said.getvalue().splitlines()


@pytest.fixture
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes most of the time of a chain; where a test is about its other stages, it is an empty file."""

    def report(runs: list[Path], out: Path, overwrite: bool, **how: Any) -> ReportResult:
        assert overwrite == out.exists()
        out.touch()
        return ReportResult(out, len(runs), None, None, [], {})

    monkeypatch.setattr("pipeline.chains.learn.report", report)


def test_a_folder_becomes_a_student(whole: tuple[Path, str]) -> None:
    root, said = whole
    out = root / "out"
    assert {"shards", "cache", "refiner", "student", "probes", "timm", "report.html", "config.yaml"} <= {
        f.name for f in out.iterdir()
    }
    assert re.search(r"student \S+ views/s and (?!0 )\S+ ms a step", said)
    assert "forecast: about" in said and "codec float16" in said and "10/10 exporting" in said
    model = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True)
    assert model.embed_dim == 12
    assert "linear" in (out / "report.html").read_text()
    probes = list((out / "student").glob("evaluate-*.json"))
    (figures,) = [json.loads(file.read_text()) for file in probes]
    assert figures["learned_from_test"] == "no" and figures["test_images"] == 4
    assert json.loads((out / "provenance.json").read_text())["stage"] == "run"


def test_every_stage_can_be_repeated_alone(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the commands as they were printed."""
    root, said = whole
    commands = [line.partition("alone: ")[2] for line in said.splitlines() if "alone: " in line]
    assert [shlex.split(c)[1] for c in commands] == [
        "prepare", "cache-teacher", "refine", "distill", "evaluate", "evaluate", "report", "export",
    ]  # fmt: skip
    before = tree_bytes(root / "out" / "cache", "provenance.json")
    for command in commands:
        assert run_singer(monkeypatch, *shlex.split(command)[1:]) == 0, (command, capfd.readouterr().err)
    assert tree_bytes(root / "out" / "cache", "provenance.json") == before


def test_a_finished_chain_is_refused_and_resumes_at_once(
    whole: tuple[Path, str], world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root, _ = whole
    assert run_singer(monkeypatch, "run", root / "photos", "--out", root / "out") == 2
    assert "exists; continue it with --resume, replace it with --overwrite" in capfd.readouterr().err
    before = {file: file.stat().st_mtime_ns for file in (root / "out").rglob("*.safetensors")}
    said = _run(world, root, root / "out", "--resume")
    assert sum("done before" in line for line in said) == 10
    assert before == {file: file.stat().st_mtime_ns for file in (root / "out").rglob("*.safetensors")}
    assert run_singer(monkeypatch, "run", root / "photos", "--out", root / "out", "--resume", "--hours", 3,
                      "--config", root / "toy.yaml") == 2  # fmt: skip
    assert "it was started with hours None, not 3" in capfd.readouterr().err


STAGES = {
    "prepare": "split", "cache_teacher": "learn", "refine": "learn", "distill": "learn", "evaluate": "learn",
    "report": "learn", "export": "run",
}  # fmt: skip


def test_a_killed_chain_goes_on(world: Path, whole: tuple[Path, str], tmp_path: Path, without_page: None) -> None:
    """Killed at every stage twice: before it began, and after it ended without the chain's having noted it."""
    root, _ = whole
    shutil.copytree(root / "photos", tmp_path / "photos")
    begun: list[str] = []

    def go_on() -> RunResult:
        mode: Mode = "resume" if (tmp_path / "out").exists() else "new"
        return run(load_config(root / "toy.yaml"), tmp_path / "photos", tmp_path / "out", mode)

    for killed, module in STAGES.items():
        place = f"pipeline.chains.{module}"
        real: Callable[..., Any] = getattr(import_module(place), killed)
        for late in (False, True):

            def dies(*args: Any, late: bool = late, real: Callable[..., Any] = real, **how: Any) -> None:
                begun.append(real.__name__)
                if late:
                    real(*args, **how)
                raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(f"{place}.{killed}", dies)
                go_on()
    assert begun == [stage for stage in STAGES for _ in range(2)]
    result = go_on()
    assert set(result.linear) == {"student", "teacher"} and result.report.exists()
    reference = root / "out" / "timm" / "model.safetensors"
    assert (result.timm / "model.safetensors").read_bytes() == reference.read_bytes()


def test_without_labels_nothing_is_probed(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw_images(tmp_path / "classes", 1, 20)
    (tmp_path / "classes" / "class0").rename(tmp_path / "photos")
    result = run(world_config(world, *SMALL), tmp_path / "photos", tmp_path / "out")
    assert result.linear == {} and result.images == 20 and not (tmp_path / "out" / "probes").exists()
    assert "no probes: the images have no labels" in capfd.readouterr().err


def test_shards_are_taken_as_they_are(world: Path, tmp_path: Path) -> None:
    result = run(world_config(world, *SMALL), world / "train", tmp_path / "out")
    assert result.images == 90 and not (tmp_path / "out" / "shards").exists()


def test_what_was_planned_stays(world: Path, tmp_path: Path, without_page: None) -> None:
    draw_images(tmp_path / "photos", 1, 6)
    sets = [*(key for key in SMALL if not key.startswith(("views", "distill"))), "distill.epochs=10"]
    first = run(world_config(world, *sets, "distill.seed=1"), tmp_path / "photos", tmp_path / "out", hours=1)
    assert first.views > 1
    with pytest.raises(UserError, match=rf"was planned with views\.count {first.views}, not 1; leave it out"):
        changed = world_config(world, *sets, "distill.seed=1", "views.count=1")
        run(changed, tmp_path / "photos", tmp_path / "out", "resume", hours=1)
    shutil.rmtree(tmp_path / "out" / "student")
    again = run(world_config(world, *sets, "distill.seed=2"), tmp_path / "photos", tmp_path / "out", "resume", hours=1)
    assert again.views == first.views and load_config(tmp_path / "out" / "student" / "config.yaml").distill.seed == 2
    shutil.rmtree(tmp_path / "out" / "cache")
    with pytest.raises(UserError, match="lost its cache, from which came .*/refiner and .*/student; remove these, "):
        run(world_config(world, *sets), tmp_path / "photos", tmp_path / "out", "resume", hours=1)


def test_joint_training_needs_no_refiner(world: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "photos", 1, 6)
    out = tmp_path / "out"
    run(world_config(world, *SMALL, "distill.joint=true"), tmp_path / "photos", out)
    assert (out / "student" / "adapters.safetensors").exists() and not (out / "refiner").exists()


def test_lists_and_tables_are_packed_and_divided(world: Path, tmp_path: Path) -> None:
    """The same images, however they are named, become shards of which some are held out; tars stay as they are."""
    draw_images(tmp_path / "a", 2, 10)
    draw_images(tmp_path / "b", 2, 10, start=50)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    files = [file for part in ("a", "b") for file in sorted((tmp_path / part).rglob("*.*"))]
    (tmp_path / "all.csv").write_text("".join(f"{file},{file.parent.name}\n" for file in files))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "all.parquet")
    config, found = world_config(world, *SMALL), {}
    for name, given in {
        "folders": [tmp_path / "link", tmp_path / "b"], "list": tmp_path / "all.csv", "table": tmp_path / "all.parquet",
    }.items():  # fmt: skip
        assert has_to_be_packed(given)
        packed, shards = shards_of(config, given, tmp_path / name, "new")
        assert packed.prepare.shard_images == 4 and len(resolve(shards)) == 10
        parts, listed = split(packed, shards), list_images(packed, shards)
        assert (parts.images, parts.probed, parts.why) == (36, 40, "")
        with ImageFile(listed) as images:
            found[name] = {(images.encoded(n)[0], int(label)) for n, label in enumerate(listed.labels)}
        assert json.loads((tmp_path / name / "classes.json").read_text()) == ["class0", "class1"]
    assert len(found["list"]) == 40 and found["list"] == found["table"] == found["folders"]
    assert not has_to_be_packed(world / "train") and not has_to_be_packed([tmp_path / "a", *resolve(world / "train")])


def test_the_advice_of_a_failure_works(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draw_images(tmp_path / "photos", 2, 3)
    (tmp_path / "photos" / "class0" / "broken.jpg").write_bytes(b"broken")
    words = ["run", tmp_path / "photos", "--out", tmp_path / "out", "--config", tmp_path / "toy.yaml"]
    (tmp_path / "toy.yaml").write_text(dump_config(world_config(world, *SMALL)))
    assert run_singer(monkeypatch, *words) == 2
    said = capfd.readouterr().err
    assert "skip all such images with --on-error skip; then go on with --resume" in said
    assert run_singer(monkeypatch, *words, "--on-error", "skip", "--resume", "--hours", 1e-9) == 2
    said = capfd.readouterr().err
    assert "done before" not in said and "more than --hours 1e-09; give --hours" in said
    # The plan has failed; a command that was printed before works nevertheless, and gives the same shards.
    shards = tree_bytes(tmp_path / "out" / "shards", "provenance.json")
    (again,) = [line.partition("alone: ")[2] for line in said.splitlines() if "alone: " in line]
    assert run_singer(monkeypatch, *shlex.split(again)[1:]) == 0, capfd.readouterr().err
    assert tree_bytes(tmp_path / "out" / "shards", "provenance.json") == shards
    assert run_singer(monkeypatch, *words, "--on-error", "skip", "--resume", "--disk-gb", 1e-9) == 2
    assert "are allowed" in capfd.readouterr().err  # and no word about other hours


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("distill.objective=vitkd cache.token_share=0.5", "objective vitkd needs all patches of an image"),
        ("refine.cleaner=adapter refine.info_form=official cache.blocks=[3]", "needs an intermediate block"),
        ("distill.share=0.5 distill.share_by=el2n cache.blocks=[1,2]", "distill.share_by el2n"),
        ("distill.holdout=0.999", "distill.holdout: all 5 images would be held out"),
        ("distill.objective=labels", "objective labels needs a cache of labelled images"),
        ("refine.cleaner=adapter refine.lr=1e30", "the adapters diverged; lower refine.lr"),
        ("distill.trackers=[foo]", "distill.trackers: unknown 'foo'"),
        ("export.output=tokens", "export.output: this exports whole models"),
        ("distill.projector=none", "projector none compares tokens as they are, and the student has 12 channels"),
    ],
)
def test_what_a_late_stage_refuses_is_said_before_the_cache_is_made(
    sets: str, message: str, world: Path, tmp_path: Path
) -> None:
    draw_images(tmp_path / "photos", 1, 5)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=re.escape(message)):
        run(world_config(world, *SMALL, *sets.split()), tmp_path / "photos" / "class0", out)
    assert not (out / "cache").exists() and not (out / "rehearsal").exists()


def test_until_the_cache_is_begun_other_settings_are_taken(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    without_page: None,
) -> None:
    draw_images(tmp_path / "photos", 1, 5)
    out, file = tmp_path / "out", tmp_path / "toy.yaml"
    file.write_text(dump_config(world_config(world, *SMALL, "distill.objective=gram", "distill.mask_share=0.4")))
    words = ["run", tmp_path / "photos", "--out", out, "--config", file]
    assert run_singer(monkeypatch, *words) == 2
    assert "or set distill.mask_share=0; then go on with --resume" in capfd.readouterr().err
    # The remedy works as printed, and the images are not packed again.
    resumed = [*words, "--set", "distill.mask_share=0", "--resume", "--hours"]
    assert run_singer(monkeypatch, *resumed, 1) == 0, capfd.readouterr().err
    assert capfd.readouterr().err.count("done before") == 1
    assert dump_config(load_config(out / "config.yaml")) == dump_config(load_config(file, ["distill.mask_share=0"]))
    # Once it has begun to cache, its settings are fixed.
    assert run_singer(monkeypatch, *resumed, 2) == 2
    assert "was started with hours 1.0, not 2.0" in capfd.readouterr().err


def test_settings_of_a_stage_can_be_changed_until_it_has_begun(world: Path, tmp_path: Path, without_page: None) -> None:
    """What a late stage refuses costs no cache: the settings, or the stage alone, are changed."""
    draw_images(tmp_path / "photos", 2, 12)
    out = tmp_path / "out"

    def chain(*sets: str, mode: Mode = "resume") -> RunResult:
        return run(world_config(world, *SMALL, *sets), tmp_path / "photos", out, mode)

    with pytest.raises(UserError, match=r"lower distill\.lr .*; then go on with --resume"):
        chain("distill.lr=1e30", "evaluate.image_size=30", mode="new")
    cache = tree_bytes(out / "cache")
    with pytest.raises(
        UserError, match=r"cache was started with cache\.codec float16, not int8; .*/cache and .*/refiner$"
    ):
        chain("cache.codec=int8")
    with pytest.raises(UserError, match=r"image_size 30 is not a multiple .*; then go on with --resume"):
        chain("evaluate.image_size=30", "evaluate.workers=1")
    assert load_config(out / "planned.yaml").evaluate.workers == 1
    assert chain().linear
    assert tree_bytes(out / "cache") == cache and load_config(out / "planned.yaml").distill.lr != 1e30
    with pytest.raises(UserError, match=r"has probes by evaluate\.seed 0, not 3; .* singer evaluate .*/student"):
        chain("evaluate.seed=3")
    student = tree_bytes(out / "student" / "student")
    with pytest.raises(UserError, match=r"student was started with distill\.seed 0, not 5; .*remove .*/student$"):
        chain("distill.seed=5")
    shutil.rmtree(out / "student")
    chain("distill.seed=5")
    assert tree_bytes(out / "cache") == cache and tree_bytes(out / "student" / "student") != student


def test_the_only_labels_are_rehearsed(world: Path, tmp_path: Path) -> None:
    """However few images have labels, and however few of a class there are; one class teaches nothing."""
    draw_images(tmp_path / "photos", 1, 40)
    config = world_config(world, *SMALL, "distill.objective=labels", "data.image_key=.png")
    for name, labels in (("two", {1: 1, 4: 0}), ("rare", dict.fromkeys(range(40), 0) | {4: 1}), ("one", {1: 1})):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for n, image in enumerate(sorted((tmp_path / "photos").rglob("*.png"))):
                tar.add(image, f"{n}.png")
                if n in labels:
                    (tmp_path / "label").write_text(str(labels[n]))
                    tar.add(tmp_path / "label", f"{n}.cls")
        refused = pytest.raises(UserError, match="all labels of the cache are of one class")
        with refused if name == "one" else contextlib.nullcontext():
            rehearse(config, [str(tmp_path / f"{name}.tar")], 40, tmp_path / "rehearsal", this_process())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hours", 0), "--hours 0 must be above 0"),
        (("--disk-gb", -1), "--disk-gb -1 must be above 0"),
        (("--gpus", 99), "--gpus 99: this machine has"),
        (("--student", "vit"), "give --student NAME: a timm model, or vit with student.dim"),
        (("--student", "dinov2_vits14"), "did you mean 'vit_small_patch14_dinov2'"),
        (("--teacher", "vit_tinny"), "did you mean 'vit_tiny"),
    ],
)
def test_mistakes(
    options: tuple[object, ...],
    message: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["run", world / "images" / "train", "--out", tmp_path / "out", "--student", "vit_tiny_patch16_224"]
    assert run_singer(monkeypatch, *words, *options) == 2
    assert message in capfd.readouterr().err


def test_several_gpus_are_started_by_accelerate() -> None:
    command = launcher(Path("/x/cli.py"), 4, ["run", "photos", "--gpus", "4"])
    parsed = launch_command_parser().parse_args(command[3:])
    assert parsed.num_processes == 4 and parsed.multi_gpu and parsed.training_script == "/x/cli.py"
    assert parsed.training_script_args == ["run", "photos", "--gpus", "4"]
