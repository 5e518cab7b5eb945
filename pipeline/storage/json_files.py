"""JSON files of singer: written whole, with their own checksum where a flipped bit must be noticed, and validated."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.storage import open_store
from pipeline.storage.atomic import write_atomic
from pipeline.storage.base import Store, is_remote
from singer.errors import UserError, continued

Value = TypeVar("Value")


def json_bytes(value: Any) -> bytes:
    """Return a value as JSON."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, durably, all or nothing."""
    write_atomic(path, json_bytes(value))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Add a value's own checksum to it, so that a flipped bit in its file is noticed."""
    return {**value, "sha256": _digest(value)}


def is_sealed(value: dict[str, Any]) -> bool:
    """Return whether a value matches the checksum in it."""
    rest = {k: v for k, v in value.items() if k != "sha256"}
    return bool(value.get("sha256") == _digest(rest))


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(place: Path | Store, name: str, what: str) -> dict[str, Any]:
    """Read the JSON object in a file of singer. Raises UserError that names the file if it is missing or broken.

    what: what `place` should be, for messages.
    """
    store = open_store(place) if isinstance(place, Path) else place
    file = f"{store.url}/{name}"
    try:
        value = json.loads(store.read(name))
    except FileNotFoundError:
        if not is_remote(store.url) and not Path(store.url).exists():
            raise UserError(f"{store.url} does not exist") from None
        raise UserError(f"{store.url} is not a {what}: it has no {name}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: it holds no JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: it holds no JSON object")
    return value


def validated(value: dict[str, Any], kind: type[Value], file: str) -> Value:
    """Validate a JSON object as a model or dataclass. Raises UserError that names the file."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            problem = f"lacks {place}: it is damaged, or another version of singer wrote it; make it again"
        else:
            problem = f"is damaged: {place}: {continued(first['msg'])}"
        raise UserError(f"{file} {problem}") from None


def read_as(path: Path, kind: type[Value], what: str) -> Value:
    """Read the JSON in a file of singer as a validated model or dataclass. Raises UserError that names the file."""
    return validated(read_json(path.parent, path.name, what), kind, str(path))
