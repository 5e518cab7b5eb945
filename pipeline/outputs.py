"""Output folders: claimed before work starts, never overwritten by accident, with the provenance of what they hold."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.config import Config, dump_config

# Every folder that singer writes holds this file; --overwrite removes nothing that lacks it.
PROVENANCE = "provenance.json"
# What a run was started on, by hash.
INPUTS = "inputs.json"
_PACKAGES = ("singer", "torch", "timm", "zarr", "tensorstore", "webdataset", "accelerate", "numpy", "pillow")
Mode = Literal["new", "resume", "overwrite"]


def output_mode(resume: bool, overwrite: bool) -> Mode:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"


def check_output(path: Path, mode: Mode) -> None:
    """Raise ValueError if `path` may not be written; changes nothing."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise ValueError(f"{path} exists and is no folder; give another --out")
    if mode == "new":
        raise ValueError(f"{path} exists; continue it with --resume, replace it with --overwrite, or give another")
    if not (path / PROVENANCE).is_file():
        raise ValueError(f"{path} was not written by singer and is left alone; give another --out")


def claim_output(path: Path, mode: Mode, stage: str, config: Config, seed: int | None) -> None:
    """Create the output folder (emptied if overwriting) with its resolved config and provenance."""
    check_output(path, mode)
    if mode == "overwrite" and path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    if (path / PROVENANCE).is_file():
        return
    write_atomic(path / "config.yaml", dump_config(config))
    write_json(
        path / PROVENANCE,
        {
            "stage": stage,
            "command": shlex.join(sys.argv),
            "seed": seed,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        },
    )


def check_resumable(path: Path, config: Config, sections: Sequence[str], free: Sequence[str]) -> None:
    """Raise ValueError naming both sides if the run at `path` had other settings in these sections.

    free: keys that do not change the result.
    """
    try:
        before = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        raise ValueError(f"{path} cannot be continued: its config.yaml is missing or damaged") from None
    now = config.model_dump(mode="json")
    for section in sections:
        for key, value in now[section].items():
            there = before.get(section, {}).get(key)
            if there != value and key not in free:
                raise ValueError(
                    f"{path} cannot be continued: it was started with {section}.{key} {there}, not {value}; "
                    "repeat its command or use --overwrite"
                )


def check_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Raise ValueError if the run at `path` was started on another cache or other adapters."""
    before = read_json(path / INPUTS, "run")
    for name, value in inputs.items():
        if before.get(name) != value:
            raise ValueError(f"{path} cannot be continued: it was started with another {name}; use that or --overwrite")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Durable and all or nothing: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The JSON in a file of singer's. Raises ValueError naming the file if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no {what}: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged: it holds no JSON") from None
