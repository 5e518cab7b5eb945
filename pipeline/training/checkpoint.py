"""Write and read the checkpoint and the log of a run. Both survive a crash at any moment."""

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
    """An object that a checkpoint can store and restore: a model, an optimiser, a loss scale ..."""

    def state_dict(self) -> Any:
        """Return all state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore what `state_dict` returned."""


class Checkpoint:
    """The file with all that a run needs to continue: the state of its parts, and the number of steps done.

    parts: {name: object, or None for one that this run does not have}; minutes: the time between two checkpoints. The
    file is replaced atomically.
    """

    def __init__(self, path: Path, parts: Mapping[str, Stateful | None], minutes: float) -> None:
        self.path = path
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._seconds = 60 * minutes
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether enough time has passed since the last checkpoint."""
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
        """Load the last checkpoint into the parts, on their devices, and return the number of steps done.

        Return 0 if there is no checkpoint. Raises UserError if it is damaged or does not fit the parts.
        """
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
    """The log of a run, one JSON object per line. Lines after the step from which the run continues are removed.

    loss: that of the last line that is kept and has one, on the main process; 0 if there is none.
    """

    def __init__(self, path: Path, first_step: int, main: bool) -> None:
        self._path, self._main, self.loss = path, main, 0.0
        if main:
            kept = [line for line in read_log(path) if line["step"] <= first_step]
            self.loss = next((float(line["loss"]) for line in reversed(kept) if "loss" in line), 0.0)
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **values: object) -> None:
        """Append a line, on the main process only."""
        if self._main:
            with self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a JSON-lines log; a line that a crash cut short is left out.

    Raises UserError if the file is not such a log.
    """
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
            number = len(lines) + 1
            raise UserError(f"{path} is damaged: line {number} has no step; remove the file to continue without it")
        lines.append(line)
    return lines
