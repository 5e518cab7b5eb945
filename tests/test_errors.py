"""Errors are an API: what users can fix is one line and exit code 2, and only a defect of singer's has a traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_singer, world_config

import cli
from pipeline.config import dump_config
from pipeline.runtime.error_kinds import DefectsFound, is_defect
from pipeline.runtime.failures import failure
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.storage.json_files import sealed
from singer.errors import UserError, continued


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file of everything that a command reads."""
    root = tmp_path_factory.mktemp("made")
    for name in ("cache", "adapters", "teacher", "train", "test"):
        shutil.copytree(world / name, root / name)
    config = world_config(root, "distill.epochs=1", "evaluate.workers=1")
    (root / "config.yaml").write_text(dump_config(config))
    distill(config, root / "cache", root / "run", root / "adapters")
    evaluate(config, root / "run", str(root / "train" / "*.tar"), str(root / "test" / "*.tar"))
    export(config, root / "run", root / "timm", "timm")
    shutil.copytree(root / "run", root / "begun")
    (root / "begun" / "run.json").unlink()
    (root / "images").mkdir()
    shutil.copytree(world / "images" / "train" / "class0", root / "images" / "class0")
    (root / "sweep.yaml").write_text("grid: {distill.seed: [1, 2]}\n")
    (root / "classes.json").write_text('["class0"]')
    return root


RESULT = "run/evaluate-*.json"
# Every command that reads what an earlier one made, and the files of those; {o} is a fresh output.
CONFIG = "--config {r}/config.yaml"
PROBES = "--train {r}/train/*.tar --test {r}/test/*.tar"
TRAINED = "distill --cache {r}/cache --refiner {r}/adapters"
READERS = {
    "prepare": (
        f"prepare {{r}}/images --out {{o}} --set prepare.classes={{r}}/classes.json {CONFIG}",
        ["classes.json"],
    ),
    "cache-teacher": (
        f"cache-teacher --shards {{r}}/train/*.tar --out {{o}} {CONFIG}",
        ["teacher/config.json", "teacher/model.safetensors", "config.yaml"],
    ),
    "append": (
        f"cache-teacher --shards {{r}}/train/*.tar --out {{r}}/cache --append {CONFIG}",
        ["cache/manifest.json", "cache/provenance.json"],
    ),
    "cache info": ("cache info {r}/cache", ["cache/manifest.json", "cache/journal/000000.json", "cache/fidelity.json"]),
    "cache verify": (
        "cache verify {r}/cache",
        ["cache/images.safetensors", "cache/records.safetensors", "cache/complete.json", "cache/config.yaml"],
    ),
    "distill": (
        f"{TRAINED} --out {{o}} {CONFIG}",
        ["cache/images.safetensors", "cache/records.safetensors", "cache/complete.json", "cache/zarr.json"],
    ),
    "refine": (
        f"refine --cache {{r}}/cache --out {{o}} --cleaner clip {CONFIG}",
        ["cache/manifest.json", "cache/tail.safetensors", "cache/calibration.safetensors"],
    ),
    "refine again": (
        f"refine --cache {{r}}/cache --out {{r}}/adapters --resume {CONFIG}",
        ["adapters/config.yaml", "adapters/metrics.json", "adapters/provenance.json"],
    ),
    "inspect": (
        f"inspect {{r}}/cache --refiner {{r}}/adapters --out {{o}} {CONFIG}",
        ["adapters/refiner.json", "adapters/refiner.safetensors"],
    ),
    "distill again": (
        f"{TRAINED} --out {{r}}/run --resume {CONFIG}",
        ["run/run.json", "run/inputs.json", "run/config.yaml", "run/provenance.json"],
    ),
    "evaluate": (
        f"evaluate {{r}}/run {PROBES} --out {{o}} {CONFIG}",
        ["run/student/config.json", "run/student/model.safetensors", "run/run.json"],
    ),
    "report": (
        "report {r}/run --out {o}.html",
        ["run/run.json", "run/inputs.json", "run/config.yaml", "run/provenance.json", "run/log.jsonl", RESULT],
    ),
    "export": (f"export {{r}}/run --to timm --out {{o}} {CONFIG}", ["run/student/config.json", "run/provenance.json"]),
    "sweep": ("sweep {r}/sweep.yaml --cache {r}/cache --out {o}", ["sweep.yaml"]),
}
# What may have happened to a file; None: it is a folder.
DAMAGES = {
    "garbage": b"\x80\x00\xff garbage \x93{[",
    "empty": b"",
    "a list": b'[{"a": [1, null]}, "b"]',
    "an object": b'{"stage": 7, "blocks": null, "student": [], "files": "x", "config": {}, "step": "x"}',
    "a folder": None,
}
OTHERS = ("empty", "a list", "a folder")
# An empty YAML file is a configuration without keys; besides, a log may be cut short.
HARMLESS = {
    ("cache-teacher", "config.yaml", "empty"),
    ("report", "run/config.yaml", "empty"),
    ("cache info", "cache/journal/000000.json", "a folder"),  # a missing shard
    ("refine again", "adapters/config.yaml", "a folder"),  # as of a run that died before it was written
    ("distill again", "run/config.yaml", "a folder"),
    ("report", "run/provenance.json", "an object"),  # versions are not told
    ("export", "run/provenance.json", "an object"),
    ("evaluate", "run/run.json", "a folder"),  # a run that is not finished
}


_OPTIONAL = ("run/log.jsonl", "cache/fidelity.json", "cache/zarr.json")


@pytest.mark.parametrize("damages", [("garbage", "an object"), pytest.param(OTHERS, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("command", READERS)
def test_damaged_files_are_one_line(
    command: str,
    damages: tuple[str, ...],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A file that a command reads, replaced by whatever it may be found as: never a defect, never a traceback."""
    words, files = READERS[command]
    wrong = []
    for name in files:
        file = next(made.glob(name))
        content = file.read_bytes()
        for damage in damages:
            data = DAMAGES[damage]
            file.unlink()
            file.mkdir() if data is None else file.write_bytes(data)
            out = tmp_path / f"{file.name}-{damage}".replace(" ", "-")
            code = run_singer(monkeypatch, *(word.format(r=made, o=out) for word in words.split()))
            told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error: ", "Traceback"))]
            harmless = (command, name, damage) in HARMLESS or name in _OPTIONAL
            if not (((code, len(told)) == (2, 1) and told[0].startswith("error: ")) or (code == 0 and harmless)):
                wrong.append((name, damage, code, told))
            if file.is_dir():
                shutil.rmtree(file)
            file.write_bytes(content)
    assert not wrong


# {file: how it was before this version}, and the commands that read it.
EARLIER: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str]] = {
    "cache/manifest.json": (
        lambda m: sealed({k: v for k, v in m.items() if k != "sha256"} | {"version": 3, "lossless": "none"}),
        r"cache has cache format version 3, not 4; make it again with cache-teacher --overwrite",
        f"cache info {{r}}/cache; refine --cache {{r}}/cache --out {{o}} {CONFIG}",
    ),
    "adapters/refiner.json": (
        lambda r: {k: v for k, v in r.items() if k != "variant"},
        r"adapters/refiner.json lacks variant: it is damaged, or another version of singer wrote it; make it again",
        f"{TRAINED} --out {{o}} {CONFIG}; inspect {{r}}/cache --refiner {{r}}/adapters --out {{o}} {CONFIG}",
    ),
    "run/run.json": (
        lambda r: {k: v for k, v in r.items() if k != "teachers"} | {"cache": "0", "adapters": None, "matching": {}},
        r"run/run.json lacks teachers: it is damaged, or another version of singer wrote it; make it again",
        f"report {{r}}/run --out {{o}}.html; export {{r}}/run --to timm --out {{o}} {CONFIG}; "
        f"evaluate {{r}}/run {PROBES} --out {{o}} {CONFIG}; {TRAINED} --out {{r}}/run --resume {CONFIG}",
    ),
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_an_earlier_version_made_is_one_line(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before, message, commands = EARLIER[name]
    content = (made / name).read_bytes()
    (made / name).write_text(json.dumps(before(json.loads(content))))
    try:
        for command in commands.split("; "):
            words = [word.format(r=made, o=tmp_path / "out") for word in command.split()]
            assert run_singer(monkeypatch, *words) == 2
            told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error: ", "Traceback"))]
            assert len(told) == 1 and re.fullmatch(f"error: .*{message}", told[0]), told
    finally:
        (made / name).write_bytes(content)


# (command, what it says with the remedy); {w} is a finished world, {o} a fresh output. Beside test_cli's MISTAKES,
# which are what is given on the command line.
TABLE = [
    ("prepare {r}/nothing --out {o}", r"nothing does not exist"),
    ("cache-teacher --shards {r}/train/*.tar --out {r}/run", r"run exists; continue it with --resume, replace it with"),
    ("refine --cache {r}/train --out {o}", r"train is not a feature cache: it has no manifest.json"),
    ("refine --cache {r}/cache --out {o} --config {r}/classes.json", r"--config .*: expected sections with keys"),
    ("inspect {r}/cache --refiner {r}/run", r"run is not a finished refiner: it has no refiner.json"),
    (
        "distill --cache {r}/cache --out {o} --set distill.epochs=many",
        r"distill.epochs: input should be a valid integer",
    ),
    ("distill --cache {r}/cache --out {o} --set distill.epochs=[", r"--set distill.epochs: '\[' is not a YAML value"),
    ("evaluate {r}/begun --test {r}/test/*.tar", r"--train|needs"),
    ("sweep {r}/classes.json --cache {r}/cache --out {o}", r"classes.json: .*"),
    ("report {r}/begun --out {o}.html", r"not a finished run: .*; finish it with --resume"),
    ("export {r}/begun --to timm --out {o}", r"is not a finished run"),
    ("export {r}/run --to tf --out {o}", r"--to.*known|--to"),
    ("cache info {r}/run", r"run is not a feature cache: it has no manifest.json"),
    ("cache verify {r}/cache --shards {r}/test/*.tar --repair --config {r}/config.yaml", r"--images does not give"),
    ("cache plan --shards {r}/train/*.tar --codec int9 --config {r}/config.yaml", r"unknown 'int9'; known: float16"),
    ("embed {r}/run {r}/test/*.tar --out {o}.npy --tokens both", r"--tokens both: a file holds .*; take block or norm"),
    ("report {r}/run --out {o}.html --student run", r"--student run: .* no run has one of that name; leave it out"),
    (
        "rank-students {r}/cache --parameters 1000000 --set student.dim=96",
        r"--set student.dim changes nothing here: it is for --student vit; leave it out",
    ),
    (
        "rank-students {r}/cache --student test_vit --set student.name=vit",
        r"student.name changes nothing here: name models with --student; leave it out",
    ),
    (
        "rank-students {r}/cache --student test_vit --set student.mlp_ratio=2",
        r"student.mlp_ratio changes nothing here: it is for --student vit and for --parameters; leave it out",
    ),
    ("demo --out {r}/run", r"run exists; replace it with --overwrite, or give another --out"),
]


@pytest.mark.parametrize(("words", "message"), TABLE, ids=[words.split(" -")[0] for words, _ in TABLE])
def test_what_users_can_fix(
    words: str,
    message: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run_singer(monkeypatch, *(word.format(r=made, o=out) for word in words.split())) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line
    assert not out.exists()


class CudaError(RuntimeError):
    """As torch's, whose class depends on its version."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a is b; give c"), 2, r"^error: a is b; give c$"),
        (OSError(28, "No space left on device", "/x"), 2, r"^error: No space left on device \(/x\)$"),
        (OSError(28, "No space left on device", b"/x"), 2, r"^error: No space left on device \(/x\)$"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            2,
            r"2 GiB\); lower the batch size",
        ),
        (MemoryError("Unable to allocate 9 TiB"), 2, r"out of memory \(Unable to allocate 9 TiB\); lower the batch"),
        (RuntimeError("CUDA out of memory. Tried"), 2, r"out of memory .*bf16, and start it again: with --resume, or"),
        (CudaError("CUDA error: all CUDA-capable devices are busy or unavailable"), 2, r"see nvidia-smi"),
        (CudaError("CUDA error: device-side assert triggered"), 1, r"defect of singer"),
        (DefectsFound("1 of 2 runs failed: a (x)"), 1, r"^error: 1 of 2 runs failed: a \(x\)$"),
        (ValueError("shapes do not match"), 1, r"defect of singer"),
        (KeyError("x"), 1, r"defect of singer.*\.log"),
        (AssertionError(), 1, r"defect of singer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_kinds_of_errors(
    error: Exception,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        cli.run_with_messages(fails)
    assert stop.value.code == code
    lines = capfd.readouterr().err.splitlines()
    assert re.search(message, lines[-1]), lines
    assert (len(lines) == 1) == (code == 2 or isinstance(error, DefectsFound))
    assert failure(error).defect == is_defect(error) == ("defect of singer" in lines[-1])


def test_only_the_first_letter_of_a_library_message_changes() -> None:
    assert continued("String should match pattern '^[A-Z]'") == "string should match pattern '^[A-Z]'"
