"""Write and read the log of a run, which survives a crash at any moment."""

import json
from pathlib import Path
from typing import Any

from pipeline.storage import naming, write_atomic
from singer.errors import UserError


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
            with naming(self._path), self._path.open("a") as file:
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
