"""What a run keeps while it goes on: its last checkpoint and its log. Both survive a crash at any moment."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.storage import write_atomic
from singer.errors import UserError


class Stateful(Protocol):
    """What can be kept and restored: a model, an optimiser, a loss scale ..."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Checkpoint:
    """All that a run needs to go on: the state of its parts, and the steps done. Replaced atomically."""

    def __init__(self, path: Path, parts: Mapping[str, Stateful | None], minutes: float) -> None:
        self.path = path
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._seconds = 60 * minutes
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether enough time has gone by since the last."""
        return time.monotonic() - self._saved >= self._seconds

    def save(self, step: int, write: bool = True) -> None:
        """Gather the state of the parts and, on one process only, write it."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        if write:
            buffer = io.BytesIO()
            torch.save({"step": step, **state}, buffer)
            write_atomic(self.path, buffer.getvalue())
        self._saved = time.monotonic()

    def restore(self) -> int:
        """Load the last checkpoint, if there is one, into the parts, where these are; the steps it had done."""
        if not self.path.is_file():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(saved[name])
        except Exception as error:  # a damaged zip, a missing key and a wrong shape differ in type
            raise UserError(f"{self.path} cannot be resumed from: {str(error).splitlines()[0]}") from None
        return int(saved["step"])


class RunLog:
    """The run's JSON lines, cut back to the step from which it goes on."""

    def __init__(self, path: Path, first_step: int, main: bool) -> None:
        self._path, self._main = path, main
        if main:
            kept = [line for line in read_log(path) if line["step"] <= first_step]
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **values: object) -> None:
        if self._main:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines log; one that a crash cut short is left out. Raises UserError if it is another file."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            raise UserError(f"{path} is damaged: line {len(lines) + 1} is of no step; remove the file to go without it")
        lines.append(line)
    return lines
