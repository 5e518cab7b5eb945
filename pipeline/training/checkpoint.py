"""Write and read the checkpoint of a run, which survives a crash at any moment."""

import io
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
        except Exception:  # a damaged zip, a missing key and a wrong shape differ in type
            raise UserError(
                f"{self.path} is damaged, or of another version; remove it to train from the start, with --resume"
            ) from None
        return int(saved["step"])
