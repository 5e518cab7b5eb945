"""Keep figures in a file, so that a long benchmark goes on where it stopped, also on another machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Figures:
    """Figures of one setting, in a file of JSON lines, which is only appended to.

    setting: what they depend on besides their name; it is the first line of the file.
    """

    def __init__(self, file: Path, setting: dict[str, Any]) -> None:
        self.file = file
        if not file.exists():
            file.write_text(json.dumps(setting) + "\n")
        first, *lines = map(json.loads, file.read_text().splitlines())
        if first != setting:
            raise SystemExit(f"{file} has figures of {first}, not of {setting}; give another --figures")
        self.known: dict[str, dict[str, Any]] = {line["of"]: line for line in lines}

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return figures by their name, after making them if they are not known."""
        if name not in self.known:
            # As the next command reads them.
            line = json.dumps({"of": name} | make())
            with self.file.open("a") as file:
                file.write(line + "\n")
            self.known[name] = json.loads(line)
        return self.known[name]
