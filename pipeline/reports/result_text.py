"""Results as text for the console: a line for each figure, with units, and tables of rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.runtime.progress import duration

# A mapping whose values are all of these types is printed on one line.
_NUMBERS = {int, float, bool, type(None)}
# Fields that only the JSON output has.
_JSON_ONLY = ("cache_place",)
# Fields that are left out where there is nothing to say.
_OFTEN_EMPTY = ("finetuned",)
# A longer list is cut in the text output; the JSON output has all of it.
_LIST_LIMIT = 24
_FEW_CLASSES = 10


def unmeasured(value: Any) -> Any:
    """Return the value with the words "not measured" in the place of None."""
    if isinstance(value, dict):
        return {name: unmeasured(field) for name, field in value.items()}
    if isinstance(value, list):
        return [unmeasured(field) for field in value]
    return "not measured" if value is None else value


def without_top5(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as it is shown: without top5 if there are few classes.

    Among few classes, almost every class is one of the first five.
    """
    if (figures.get("classes") or 0) > _FEW_CLASSES:
        return dict(figures)

    def part(value: Any) -> Any:
        return {k: part(v) for k, v in value.items() if k != "top5"} if isinstance(value, dict) else value

    return {name: part(value) for name, value in figures.items() if name != "top5"}


def as_lines(value: dict[Any, Any]) -> Iterator[str]:
    """Yield one line for each figure; nested figures are indented, and a list of flat rows is a table."""
    for name, field in value.items():
        if name in _JSON_ONLY or (name in _OFTEN_EMPTY and not field):
            continue
        inner: Iterable[str] = ()
        if isinstance(field, dict) and {type(v) for v in field.values()} - _NUMBERS:
            inner = as_lines(field)
        elif isinstance(field, list) and field and isinstance(field[0], dict):
            flat = not any(isinstance(cell, dict | list) for row in field for cell in row.values())
            inner = _table(field) if flat else _items(field)
        if inner:
            yield f"{name}:"
            yield from (f"  {line}" for line in inner)
        else:
            yield f"{name}: {_text(field, name)}"


def _items(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        first, *others = as_lines(row)
        yield f"- {first}"
        yield from (f"  {line}" for line in others)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    cells = [list(rows[0]), *([_text(v, name) for name, v in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]


def _text(value: Any, name: object = "") -> str:
    if value is None or value in ([], (), {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and "bytes" in str(name):
        return _size(value)
    if isinstance(value, float):
        return f"{value:.4g}" + (f" ({duration(3600 * value)})" if str(name).endswith("hours") else "")
    if isinstance(value, dict) and name == "matching":
        return ", ".join(f"{teacher} -> {student}" for teacher, student in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{k} ({_text(v)})" if isinstance(v, dict) else f"{k} {_text(v, k)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        more = f" ... ({len(value)} in all)" if len(value) > _LIST_LIMIT else ""
        return ", ".join(map(_text, value[:_LIST_LIMIT])) + more
    return str(value)


def _size(count: int) -> str:
    """Return a number of bytes as text: 1234567 is "1.23 MB"."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"
