"""Errors are an API: what users can fix is one line and exit code 2, and only a defect of singer's has a traceback."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import world_config

import cli
from pipeline.config import dump_config
from pipeline.distill import distill
from pipeline.evaluate import evaluate
from pipeline.export import export


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["singer", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


SWEEP = """
set: {distill.epochs: 1}
refiners: {std: {cleaner: none, normaliser: standardize}}
grid:
  distill.objective: [mse]
runs:
  - {name: a, refiner: std}
"""


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
    (root / "classes.json").write_text('["class0"]')
    return root


# Every command, with what it reads; {o} is a fresh output.
COMMANDS = {
    "prepare": "prepare {r}/images --out {o} --set prepare.classes={r}/classes.json --config {r}/config.yaml",
    "cache-teacher": "cache-teacher --shards {r}/train/*.tar --out {o} --config {r}/config.yaml",
    "append": "cache-teacher --shards {r}/train/*.tar --out {r}/cache --append --blocks 2,3 --config {r}/config.yaml",
    "resume cache": "cache-teacher --shards {r}/train/*.tar --out {r}/cache --resume --config {r}/config.yaml",
    "cache info": "cache info {r}/cache",
    "cache verify": "cache verify {r}/cache",
    "cache verify live": "cache verify {r}/cache --weights {r}/teacher/model.safetensors --sample 4",
    "inspect": "inspect {r}/cache --adapters {r}/adapters --out {o} --config {r}/config.yaml",
    "refine": "refine --cache {r}/cache --out {o} --cleaner clip --config {r}/config.yaml",
    "resume refine": "refine --cache {r}/cache --out {r}/adapters --resume --config {r}/config.yaml",
    "distill": "distill --cache {r}/cache --adapters {r}/adapters --out {o} --config {r}/config.yaml",
    "resume distill": "distill --cache {r}/cache --adapters {r}/adapters --out {r}/run --resume --config {r}/config.yaml",
    "go on": "distill --cache {r}/cache --adapters {r}/adapters --out {r}/begun --resume --config {r}/config.yaml",
    "evaluate": "evaluate {r}/run --train {r}/train/*.tar --test {r}/test/*.tar --out {o} --config {r}/config.yaml",
    "report": "report {r}/run --out {o}.html",
    "export": "export {r}/run --to timm --out {o} --config {r}/config.yaml",
    "evaluate export": "evaluate {r}/timm --train {r}/train/*.tar --test {r}/test/*.tar --config {r}/config.yaml",
}
# What may have happened to a file.
DAMAGES = {
    "garbage": b"\x80\x00\xff garbage \x93{[",
    "empty": b"",
    "another shape": b'[{"a": [1, null]}, "b"]',
    "an object": b'{"stage": 7, "blocks": null, "student": [], "files": "x", "architecture": 3}',
    "a scalar": b"3",
    "deep": b"[" * 20000,
}


def small_files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        if (
            file.is_file() and "images" not in file.parts and "features" not in file.parts[-6:-1]
        ) or file.name == "zarr.json":
            yield file
