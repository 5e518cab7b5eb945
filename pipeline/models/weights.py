"""Read weights as people have them: what is in a file decides how it is read, and not its name.

A file is safetensors, the index of sharded safetensors, or PyTorch's; nothing but tensors and plain values is ever
unpickled. State dicts are taken out of what training programs wrap around them, and the prefixes of wrapping modules
are stripped. What was taken, stripped and left out is said.
"""

import argparse
import json
import pathlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.fetching import first_line
from pipeline.runtime.progress import say
from pipeline.storage.tensors import read_tensors
from singer.errors import UserError

# Keys under which training programs store a state dict: averaged over the steps, and not. DINO's teacher is the
# average of its student.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
PLAIN = ("state_dict", "model_state_dict", "model", "student", "network", "net", "module", "backbone", "encoder")
# Modules that wrap a backbone.
WRAPPERS = {
    "module", "_orig_mod", "model", "base_model", "backbone", "encoder", "teacher", "student", "network", "net",
    "visual", "trunk", "vit",
}  # fmt: skip
# Plain values that training programs store beside tensors. They have no code that runs when they are read.
_HARMLESS: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
_HEAD_BYTES = 64


@dataclass
class _Taken:
    """What was done to get the state dict, in words."""

    steps: list[str] = field(default_factory=list)

    def say(self, path: Path) -> None:
        if self.steps:
            say(f"weights {path}: {'; '.join(self.steps)}")


def read_weights(path: Path, expected: Collection[str] = (), averaged: bool = True) -> dict[str, Tensor]:
    """Read the state dict in a file, or in a folder of safetensors.

    expected: the names of the model's tensors, by which prefixes are recognised. averaged: take averaged weights (EMA)
    where the file has both. Raises UserError if the file is missing, damaged or something else, or has no state dict.
    """
    if path.is_dir():
        path = next(
            (f for f in (path / "model.safetensors.index.json", path / "model.safetensors") if f.is_file()), path
        )
    if not path.is_file():
        raise UserError(f"weights {path}: " + ("a folder without safetensors" if path.is_dir() else "no such file"))
    taken = _Taken()
    state = _state_dict(_load(path), path, averaged, taken)
    state = _stripped(state, expected, taken)
    taken.say(path)
    return state


def _load(path: Path) -> Any:
    """Read a file by its content."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise UserError(f"weights {path}: the file is empty; copy or download it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return read_tensors(path)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"weights {path}: this is only a pointer of git-lfs; fetch the file with git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"weights {path}: this is a saved web page and no weights; download the file itself")
    if head.lstrip().startswith(b"{"):
        return _load_indexed(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors differ in type
        text = str(error)
        if "Unsupported global" in text:
            name = text.partition("GLOBAL ")[2].split(" ")[0] or "an object"
            raise UserError(
                f"weights {path} hold {name} beside tensors, which is never unpickled; in the program that wrote the "
                "file, save the tensors alone: torch.save(model.state_dict(), FILE)"
            ) from None
        if "Weights only load failed" in text:  # torch goes on with advice that is about other files
            raise UserError(f"weights {path} cannot be read: neither safetensors nor a file of torch.save") from None
        raise UserError(f"weights {path} cannot be read: {first_line(error)}") from None


def _load_indexed(index: Path) -> dict[str, Tensor]:
    """Read all files that an index of safetensors names."""
    try:
        names = json.loads(index.read_text())["weight_map"]
        files = sorted(set(names.values()))
        assert all(isinstance(name, str) and "/" not in name for name in files)
    except (ValueError, KeyError, AttributeError, TypeError, AssertionError):
        raise UserError(f"weights {index}: this is JSON, but no index of sharded safetensors") from None
    state: dict[str, Tensor] = {}
    for name in files:
        state |= read_tensors(index.parent / name)
    missing = sorted(set(names) - set(state))
    if missing:
        raise UserError(f"weights {index}: its shards lack {missing[0]!r}")
    return state


def _state_dict(loaded: Any, path: Path, averaged: bool, taken: _Taken) -> dict[str, Tensor]:
    """Take the state dict out of what a program stored around it."""
    while isinstance(loaded, dict) and not any(isinstance(value, Tensor) for value in loaded.values()):
        first, second = (AVERAGED, PLAIN) if averaged else (PLAIN, AVERAGED)
        there = [key for key in (*first, *second) if isinstance(loaded.get(key), dict) and loaded[key]]
        if not there:
            break
        kinds = {key in AVERAGED for key in there}
        if len(kinds) > 1:
            other = next(key for key in there if (key in AVERAGED) != (there[0] in AVERAGED))
            remedy = f"teacher.averaged={'false' if there[0] in AVERAGED else 'true'}"
            taken.steps.append(f"took {there[0]!r}, and not {other!r} ({remedy} takes that)")
        else:
            taken.steps.append(f"took {there[0]!r}")
        loaded = loaded[there[0]]
    if isinstance(loaded, dict):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
        if tensors:
            others = len(loaded) - len(tensors)
            if others:
                taken.steps.append(f"left out {others} values that are not tensors")
            return tensors
    keys = f"; it has {', '.join(map(repr, list(loaded)[:5]))}" if isinstance(loaded, dict) else ""
    raise UserError(f"weights {path}: no state dict of tensors was found{keys}")


def _stripped(state: Mapping[str, Tensor], expected: Collection[str], taken: _Taken) -> dict[str, Tensor]:
    """Strip the prefix of wrapping modules with which most names are those of the model.

    Tensors without the prefix belong to what was around the model, such as a projection head, and are left out.
    """
    prefixes = sorted({prefix for name in state for prefix in _wrappings(name)}, key=len)
    found = {p: {n.removeprefix(p): t for n, t in state.items() if n.startswith(p)} for p in ("", *prefixes)}
    best = max(found, key=lambda p: len(set(expected) & set(found[p])))  # the first of equals, which is the shortest
    if best:
        left = len(state) - len(found[best])
        taken.steps.append(f"stripped {best!r}" + (f" and left out {left} tensors without it" if left else ""))
    return found[best]


def _wrappings(name: str) -> list[str]:
    """Return the prefixes of a tensor's name that consist of wrapping modules."""
    parts, found = name.split(".")[:-1], []
    for count, part in enumerate(parts, start=1):
        if part not in WRAPPERS:
            break
        found.append(".".join(parts[:count]) + ".")
    return found


def describe_size(state: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """Return (width, number of blocks, patch size) of a ViT's state dict; None if it is not a ViT's."""
    patch = next((t for n, t in state.items() if n.endswith("patch_embed.proj.weight") and t.dim() == 4), None)
    blocks = {n.split(".")[1] for n in state if n.startswith("blocks.") and n.split(".")[1].isdigit()}
    return None if patch is None or not blocks else (int(patch.shape[0]), len(blocks), int(patch.shape[-1]))
