"""Output folders: claimed before work starts, never overwritten by accident, with the provenance of what they hold."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors
import safetensors.torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.config import Config, dump_config

# Every folder that singer writes holds this file; --overwrite removes nothing that lacks it.
PROVENANCE = "provenance.json"
CONFIG = "config.yaml"
# What a run was started on, by hash.
INPUTS = "inputs.json"
_PACKAGES = ("singer", "torch", "timm", "zarr", "tensorstore", "webdataset", "accelerate", "numpy", "pillow")
# The sections of the configuration that each stage's result depends on; empty: the stage does not resume.
_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "cache-teacher": ("teacher", "views", "cache"),
    "refine": ("refine",),
    "distill": ("student", "distill"),
    "demo": (),
}
# Keys of these sections that do not: speed, and places of files whose content is compared by hash.
_FREE = ("workers", "checkpoint_minutes", "weights", "name")
Mode = Literal["new", "resume", "overwrite"]
Value = TypeVar("Value")


def output_mode(resume: bool, overwrite: bool) -> Mode:
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"


def check_output(path: Path, mode: Mode, stage: str, config: Config, inputs: Sequence[Path] = ()) -> None:
    """Raise ValueError if `stage` may not write to `path`; changes nothing.

    inputs: what the stage reads. They may neither lie in the output nor hold it.
    """
    here = path.resolve()
    for source in inputs:
        there = source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"--out {path} is or touches the input {source}; give another --out")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise ValueError(f"{path} exists and is no folder; give another --out")
    can_resume = bool(_SECTIONS[stage])
    if mode == "new":
        remedy = (
            "continue it with --resume, replace it with --overwrite" if can_resume else "replace it with --overwrite"
        )
        raise ValueError(f"{path} exists; {remedy}, or give another --out")
    if not (path / PROVENANCE).is_file():
        raise ValueError(f"{path} was not written by singer and is left alone; give another --out")
    written = read_json(path / PROVENANCE, "output of singer").get("stage")
    if written != stage:
        raise ValueError(f"{path} was written by singer {written}, not by {stage}; give another --out")
    if mode == "resume":
        assert can_resume
        _check_same_config(path, config, _SECTIONS[stage])


@contextmanager
def claimed_output(path: Path, mode: Mode, stage: str, config: Config, seed: int | None) -> Iterator[None]:
    """The output folder for as long as the stage runs, emptied if overwriting, with its provenance and config.

    A second run on the same folder is refused meanwhile; the system frees the lock at any kind of death.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder removes the file: a lock on a removed one keeps nobody out.
            held = lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino
        except BlockingIOError:
            held = False
        if not held:
            raise ValueError(f"{path} is being written by another run")
        try:
            check_output(path, mode, stage, config)
            if mode == "overwrite" and path.exists():
                # Away in one step: a half-removed folder could not be told from a stranger's.
                removed = path.parent / f".{path.name}.removed.{os.getpid()}"
                path.rename(removed)
                shutil.rmtree(removed)
            path.mkdir(exist_ok=True)
            if not (path / PROVENANCE).is_file():
                _write_provenance(path, stage, seed)
            if not (path / CONFIG).is_file():
                write_atomic(path / CONFIG, dump_config(config))
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_inputs(path: Path, inputs: Mapping[str, str | None]) -> None:
    """Raise ValueError if the run at `path` was started on another cache or other adapters."""
    before = read_as(path / INPUTS, dict[str, str | None], "run")
    for name, value in inputs.items():
        if before.get(name) != value:
            raise ValueError(f"{path} cannot be continued: it was started with another {name}; use that or --overwrite")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Durable and all or nothing: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_atomic(path, safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Raises ValueError naming the file if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path, device=device)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of singer's. Raises ValueError naming the file if it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} is no {what}: it has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged: it holds no JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def read_as(path: Path, kind: type[Value], what: str) -> Value:
    """The JSON in a file of singer's as a validated model or dataclass. Raises ValueError naming the file."""
    value = read_json(path, what)
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {place}: {first['msg'].lower()}") from None


def _write_provenance(path: Path, stage: str, seed: int | None) -> None:
    versions = {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}
    write_json(
        path / PROVENANCE,
        {"stage": stage, "command": shlex.join(sys.argv), "seed": seed, "versions": versions},
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_same_config(path: Path, config: Config, sections: Sequence[str]) -> None:
    """Raise ValueError naming both sides if the run at `path` had other settings in these sections."""
    if not (path / CONFIG).is_file():
        return  # it died before it wrote anything
    try:
        before = yaml.safe_load((path / CONFIG).read_text())
        pairs = [(s, k, before[s][k], v) for s in sections for k, v in config.model_dump(mode="json")[s].items()]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be continued: its {CONFIG} is damaged; use --overwrite") from None
    for section, key, there, here in pairs:
        if there != here and (key not in _FREE or (section, key) == ("student", "name")):
            raise ValueError(
                f"{path} cannot be continued: it was started with {section}.{key} {there}, not {here}; "
                "repeat its command or use --overwrite"
            )
