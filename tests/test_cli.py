"""The command line: what it prints, and that every mistake is one line, exit code 2, and nothing written."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_vit, run_singer, tree_bytes

import cli
from pipeline.cache.codecs import CODECS
from pipeline.config import load_config
from pipeline.config.reference import as_markdown
from pipeline.evaluation.figures import FIGURES
from pipeline.evaluation.tasks import TASKS
from pipeline.models.backbone import save_backbone
from pipeline.reports.result_text import as_lines


def test_chain_with_json(
    world: Path,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def result(*args: object) -> dict[str, Any]:
        config = [] if args[:2] == ("cache", "info") else ["--config", config_file]
        assert run_singer(monkeypatch, *args, *config, "--json") == 0
        value = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert isinstance(value, dict)
        return value

    images = world / "images" / "train"
    made = result("prepare", images, "--out", tmp_path / "shards")
    assert made["images"] == 100
    shards = tmp_path / "shards" / "shards-{000000..000000}.tar"
    planned = result("cache", "plan", "--shards", shards, "--codec", "int8", "--seconds", 0.05, "--out", tmp_path)
    assert planned["chosen"]["codec"] == "int8" and planned["best_fit"]["codec"] == "float16"
    assert not (tmp_path / "cache").exists()
    cache = result("cache-teacher", "--shards", shards, "--out", tmp_path / "cache", "--blocks", "-2,-1")
    assert cache["blocks"] == [2, 3] and cache["records"] == 100
    info = result("cache", "info", tmp_path / "cache")
    assert info["teachers"][0]["id"] == cache["id"] and info["bytes"] == cache["bytes"]
    assert info["teachers"][0]["fidelity"]["2"]["clean"]["cosine"] > 0.999
    weights = world / "teacher" / "model.safetensors"
    verified = result("cache", "verify", tmp_path / "cache", "--weights", weights, "--sample", 9)
    assert verified["whole"] is True and verified["parts"][0]["live"]["records"] == 9
    adapters = result("refine", "--cache", tmp_path / "cache", "--out", tmp_path / "a", "--rank", 3, "--steps", 20)
    assert adapters["cleaner"] == "adapter" and set(adapters["blocks"]) == {"2", "3"}
    trained = ["distill", "--cache", tmp_path / "cache", "--refiner", tmp_path / "a", "--out", tmp_path / "run"]
    assert result(*trained, "--epochs", 1)["steps"] == 7
    probed = result("evaluate", tmp_path / "run", "--train", shards, "--test", world / "test" / "*.tar")
    for probe in ("linear", "knn"):
        for tokens in ("cls", "mean_patch"):
            assert 0 <= probed[probe][tokens]["top1"] <= 100
    exported = result("export", tmp_path / "run", "--to", "torch-export", "--out", tmp_path / "e", "--output", "tokens")
    assert exported["output"] == "tokens" and exported["max_difference"] < 1e-4


# name: (arguments, a part of the message); {w} is the world, {o} a fresh output
MISTAKES = {
    "no images": ("prepare {w}/none --out {o}", "none does not exist"),
    "unknown layout": ("prepare {w}/images/train --out {o} --layout coco", "--layout: unknown 'coco'; known: folder"),
    "no split": ("prepare {w}/images/train --out {o} --layout ade20k", "the layout ade20k has train, val; give one of"),
    "empty glob": ("cache-teacher --shards {w}/x-*.tar --out {o}", "nothing matches"),
    "missing shard": ("cache-teacher --shards {w}/train/x.tar --out {o}", "x.tar does not exist"),
    "unknown teacher": (
        "cache-teacher --shards {w}/train/*.tar --out {o} --teacher vit_tinny",
        "did you mean 'vit_tiny",
    ),
    "wrong layers": ("cache-teacher --shards {w}/train/*.tar --out {o} --blocks 2,9", "block 9 does not exist"),
    "no layers": (
        "cache-teacher --shards {w}/train/*.tar --out {o} --blocks a",
        "cache.blocks.0: input should",
    ),
    "unknown codec": (
        "cache-teacher --shards {w}/train/*.tar --out {o} --codec int7",
        "cache.codec: unknown 'int7'; known",
    ),
    "no weights": ("cache-teacher --shards {w}/train/*.tar --out {o} --weights {w}/w.pth", "w.pth: no such file"),
    "weights do not fit": (
        "cache-teacher --shards {w}/train/*.tar --out {o} --weights {m}/model.safetensors",
        "do not fit local-dir:",
    ),
    "existing output": ("cache-teacher --shards {w}/train/*.tar --out {w}/cache", "cache exists; continue it with"),
    "both modes": ("cache-teacher --shards {w}/train/*.tar --out {o} --resume --overwrite", "exclude each other"),
    "no cache": ("refine --cache {w}/none --out {o}", "none does not exist"),
    "not a cache": ("refine --cache {w}/teacher --out {o}", "teacher is not a feature cache"),
    "rank": ("refine --cache {w}/cache --out {o} --rank 99", "refine.rank 99 is larger than the feature width 24"),
    "adapters exist": ("refine --cache {w}/cache --out {w}/adapters", "adapters exists; continue it with"),
    "other cache": ("distill --cache {c} --refiner {w}/adapters --out {o}", "was fitted to cache"),
    "no adapters": ("distill --cache {w}/cache --refiner {w}/none --out {o}", "none does not exist"),
    "shallow student": (
        "distill --cache {w}/cache --out {o} --set student.depth=1",
        "2 teacher blocks cannot be",
    ),
    "no student": (
        "distill --cache {w}/cache --out {o} --student vit_tinny --config demo --set student.dim=48",
        "no model 'vit_tinny'; did you mean 'vit_tiny",
    ),
    "another student's shape": (
        "distill --cache {w}/cache --out {o} --student vit_tiny_patch16_224 --set student.dim=48",
        "are for student.name vit; leave them out for vit_tiny_patch16_224",
    ),
    "unknown key": ("distill --cache {w}/cache --out {o} --set distill.epoch=3", "did you mean 'distill.epochs'?"),
    "no config": ("distill --cache {w}/cache --out {o} --config {w}/x.yaml", "no such file, nor a recipe among"),
    "no run": (
        "evaluate {w}/none --train {w}/train/*.tar --test {w}/test/*.tar",
        "none does not exist",
    ),
    "no model of this name": (
        "evaluate vit_tinny --test {w}/test/*.tar",
        "vit_tinny does not exist, and timm has no model of this name; did you mean 'vit_tiny",
    ),
    "weights of no model": (
        "evaluate vit_tiny_patch16_224 --weights {w}/w.pth --test {w}/test/*.tar",
        "w.pth: no such file",
    ),
    "weights of a folder": (
        "evaluate {w}/teacher --weights {m}/model.safetensors --test {w}/test/*.tar",
        "is for a model given by name; the folder",
    ),
    "no such task": (
        "evaluate {w}/teacher --task flow --train {w}/train/*.tar --test {w}/test/*.tar",
        "--task: unknown 'flow'; known: classification, segmentation",
    ),
    "no masks": (
        "evaluate {w}/teacher --task segmentation --set evaluate.seg_classes=3 --train {w}/train/*.tar "
        "--test {w}/test/*.tar",
        "has no .seg.png; every image needs one",
    ),
    "not a run": ("evaluate {w}/cache --train {w}/train/*.tar --test {w}/test/*.tar", "by singer cache-teacher;"),
    "an unfinished run": (
        "evaluate {u} --test {w}/test/*.tar",
        "is not a finished run: repeat its distill command with --resume",
    ),
    "no training shards": ("evaluate {w}/teacher --test {w}/test/*.tar", "this task learns from images; give --train"),
    "no test shards": ("evaluate {w}/teacher --train {w}/train/*.tar --test {w}/none/*.tar", "nothing matches"),
    "no labels": (
        "evaluate {w}/teacher --train {f}/*.tar --test {w}/test/*.tar",
        "2 of 2 images have no .cls",
    ),
    "out is the input": ("refine --cache {w}/cache --out {w}/cache --overwrite", "overlaps the input"),
    "out below a file": (
        "refine --cache {w}/cache --out {w}/test/classes.json/x/y",
        "classes.json is not a folder; give",
    ),
    "out holds the shards": (
        "cache-teacher --shards {w}/train/*.tar --out {w}/train --overwrite",
        "overlaps the input",
    ),
    "out is the adapters": (
        "distill --cache {w}/cache --refiner {w}/adapters --out {w}/adapters --overwrite",
        "overlaps the input",
    ),
    "out of another stage": ("distill --cache {w}/cache --out {w}/test --resume", "was written by singer prepare, not"),
    "negative seed": ("distill --cache {w}/cache --out {o} --seed -1", "distill.seed: input should be greater"),
    "unknown rate": (
        "distill --cache {w}/cache --out {o} --lr fast",
        "got 'fast'; distill.lr takes number > 0 or auto",
    ),
    "report of no run": ("report {w}/cache --out {o}.html", "cache is not a finished run: it has no run.json"),
    "report in no page": ("report {w}/none --out {o}", "a report is one file; give a name that ends in .html"),
    "unknown format": ("export {w}/none --to onxx --out {o}", "--to: unknown 'onxx'; known: timm, hf, onnx, torch-"),
    "export of no run": ("export {w}/cache --to timm --out {o}", "cache is not a finished run: it has no run.json"),
    "unknown output": ("export {w}/none --to onnx --out {o} --output cls", "export.output: input should be 'pooled'"),
    "info of nothing": ("cache info {w}/none", "none does not exist"),
    "verify nothing": ("cache verify {w}/none", "none does not exist"),
    "verify no weights": ("cache verify {w}/cache --weights {w}/w.pth", "w.pth: no such file"),
    "verify another teacher": (
        "cache verify {w}/cache --teacher local-dir:{m}",
        "the cache's teacher.model_args.embed_",
    ),
    "repair with other weights": (
        "cache verify {w}/cache --repair --weights {m}/model.safetensors",
        "do not fit local",
    ),
    "verify without its shards": ("cache verify {w}/cache --repair --shards {w}/test/*.tar", "--images does not give"),
    "damaged cache": (
        "cache verify {d}",
        "2 of 4 Zarr shards of {d} are damaged or missing: 1, 3; repair with singer cache",
    ),
    "plan without shards": ("cache plan --shards {w}/x-*.tar", "nothing matches"),
    "plan with no codec": ("cache plan --shards {w}/train/*.tar --codec int7", "cache.codec: unknown 'int7'; known"),
    "plan beyond the teacher": ("cache plan --shards {w}/train/*.tar --blocks 2,9", "block 9 does not exist"),
}


@pytest.fixture(scope="session")
def extras(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """m: a model of another width; c: another cache; d: a damaged one; f: shards without labels; u: a run
    that was interrupted."""
    from conftest import world_config
    from PIL import Image

    from pipeline.stages.cache_teacher import cache_teacher
    from pipeline.stages.prepare import prepare

    root = tmp_path_factory.mktemp("extras")
    wide = make_vit(embed_dim=32)
    save_backbone(wide, wide.model.state_dict(), root / "m")
    config = world_config(world)
    cache_teacher(config, str(world / "test" / "*.tar"), root / "c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 10)
        cache_teacher(config, str(world / "test" / "*.tar"), root / "d")
    (root / "d" / "features/2/values/c/1/0/0").unlink()
    (root / "d" / "features/3/values/c/3/0/0").write_bytes(b"")
    (root / "flat").mkdir()
    for name in "ab":
        Image.new("RGB", (9, 9)).save(root / "flat" / f"{name}.png")
    prepare(config, root / "flat", root / "f")
    (root / "u").mkdir()
    (root / "u" / "provenance.json").write_text('{"stage": "distill"}')
    return {name: root / name for name in "mcdfu"}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(
    name: str,
    world: Path,
    config_file: Path,
    extras: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, message = MISTAKES[name]
    args = [part.format(w=world, o=tmp_path / "out", **extras) for part in command.split()]
    if "--config" not in args and not command.startswith(("cache info", "report")):
        args += ["--config", str(config_file)]
    before = tree_bytes(world)
    assert run_singer(monkeypatch, *args) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), error
    assert message.format(**extras) in error[0]
    assert not (tmp_path / "out").exists()
    assert tree_bytes(world) == before


def test_a_damaged_cache_is_reported_before_the_error(
    extras: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_singer(monkeypatch, "cache", "verify", extras["d"], "--json") == 2
    value = json.loads(capsys.readouterr().out)
    (part,) = value["parts"]
    assert value["whole"] is False and part["damaged"] == [1, 3] and part["live"] is None
    assert part["files"]["features/2/values/c/1/0/0"] == "missing"
    assert run_singer(monkeypatch, "cache", "verify", extras["d"]) == 2
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {"whole: no", "damaged: 1, 3", "missing: none", "features/2/values/c/1/0/0: missing"} < set(lines)


def test_text_is_indented_and_aligned() -> None:
    @dataclasses.dataclass
    class Result:
        bytes: int
        hours: float
        matching: dict[int, int]
        finetuned: None
        cache_place: str
        numbers: list[int]
        nothing: None
        options: list[dict[str, object]]
        parts: list[dict[str, object]]
        blocks: dict[int, dict[str, dict[str, float]]]

    rows: list[dict[str, object]] = [{"codec": "int8", "fits": True}, {"codec": "float16", "fits": None}]
    parts: list[dict[str, object]] = [{"part": ".", "files": {"a/b": "missing"}, "damaged": []}]
    blocks = {2: {"clean": {"error": 0.12345, "cosine": 1.0}}}
    result = Result(1_234_567, 0.0015, {8: 2, 11: 3}, None, "/c", list(range(30)), None, rows, parts, blocks)
    assert list(as_lines(dataclasses.asdict(result))) == [
        "bytes: 1.23 MB",
        "hours: 0.0015 (5 s)",
        "matching: 8 -> 2, 11 -> 3",
        f"numbers: {', '.join(map(str, range(24)))} ... (30 in all)",
        "nothing: none",
        "options:",
        "    codec  fits",
        "     int8   yes",
        "  float16  none",
        "parts:",
        "  - part: .",
        "    files:",
        "      a/b: missing",
        "    damaged: none",
        "blocks:",
        "  2:",
        "    clean: error 0.1235, cosine 1",
    ]


def test_usage_errors_exit_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_singer(monkeypatch, "refine") == 2
    assert run_singer(monkeypatch, "frobnicate") == 2


def test_config_prints_what_config_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--config", "vit-l-to-ti", "--set", "distill.lr=0.25")
    assert run_singer(monkeypatch, "config", *given) == 0
    file = tmp_path / "all.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config("vit-l-to-ti", ["distill.lr=0.25"])
    assert run_singer(monkeypatch, "config", "--markdown") == 0
    assert capsys.readouterr().out == as_markdown()
    assert run_singer(monkeypatch, "config", "--markdown", *given) == 2
    assert "leave out --config and --set" in capsys.readouterr().err


def test_help_lists_every_command() -> None:
    """Runs the installed console script."""
    script = Path(sys.executable).with_name("singer")
    text = subprocess.run([script, "--help"], check=True, capture_output=True, text=True, cwd="/").stdout
    for command in (
        "prepare",
        "cache-teacher",
        "refine",
        "distill",
        "evaluate",
        "sweep",
        "report",
        "export",
        "cache",
        "demo",
    ):
        assert command in text


def test_version_is_that_of_our_distribution(tmp_path: Path) -> None:
    """Of `singer-vit`, whatever a stranger's `singer` beside it has; found without waiting for torch."""
    for name, version in (("singer", "0.0.1"), ("singer_vit", "9.8.7")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.4\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    code = (
        "import sys, cli\n"
        "from pipeline.runtime.machine import versions\n"
        "assert versions()['singer'] == '9.8.7', versions()\n"
        "sys.argv = ['singer', '--version']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr, done.returncode) == ("singer 9.8.7\n", "", 0)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("singer ca", {"cache", "cache-teacher"}),
        ("singer cache ve", {"verify"}),
        ("singer --verbose distill --ep", {"--epochs"}),
        ("singer --ver", {"--verbose", "--version"}),
    ],
)
def test_shell_completes_commands_and_options(words: str, offered: set[str]) -> None:
    """As the script that --show-completion prints asks for them, without waiting for torch."""
    code = (
        "import sys, cli\n"
        "sys.argv = ['singer']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    question = {
        "_SINGER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": str(Path(cli.__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **question}, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == offered


def test_completion_is_offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_singer(monkeypatch, "--help") == 0
    assert {"--install-completion", "--show-completion", "--version"} <= set(capsys.readouterr().out.split())
    # Otherwise the shell would be that of the process which started the tests, if it has one.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert run_singer(monkeypatch, "--show-completion", "bash") == 0
    assert "_COMPLETE=complete_bash" in capsys.readouterr().out


def test_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError(28, "No space left on device", "/cache/x")

    with pytest.raises(SystemExit) as stop:
        cli.run_with_messages(fails)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: No space left on device (/cache/x)\n"


def test_help_names_every_part() -> None:
    """The lines of help are written by hand, because registries would load torch."""
    assert [c for c in CODECS if c not in cli.CODEC_HELP and not c.endswith("-plain")] == []
    assert [t for t in TASKS if t not in cli.TASK_HELP] == []
    assert FIGURES.keys() == TASKS.keys()


def test_home_folders_after_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("distill:\n  epochs: 7\n")
    assert run_singer(monkeypatch, "config", "--config=~/own.yaml") == 0
    assert "epochs: 7" in capfd.readouterr().out
