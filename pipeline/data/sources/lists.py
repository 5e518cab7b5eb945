"""Lists of image files and their labels: text, CSV, TSV, or one JSON object a line."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.image_keys import file_keys
from pipeline.data.source_listing import SourceListing
from pipeline.data.sources.folder import FOLDER, FileReader, add_files
from pipeline.data.sources.kind import Kind, Options, Samples, numbered
from pipeline.data.walk import printable
from pipeline.storage import is_remote
from singer.errors import UserError

PATHS = ("path", "image", "file_name", "filename", "file", "filepath", "file_path", "image_path")
LABELS = ("label", "class", "labels", "class_name", "cls")
# A path and its label, if it has one.
Pair = tuple[str, str | float | None]


def _text(file: Iterable[str], path: Path) -> Iterator[Pair]:
    """Read lines `PATH`, `PATH LABEL`, or the two with a tab between; a path may have blanks. `#` begins a comment."""
    for line in map(str.strip, file):
        if line.startswith("#"):
            continue
        if "\t" in line:
            name, _, label = line.partition("\t")
            yield name.strip(), label
        elif line:
            name, _, label = line.rpartition(" ")
            yield (line, None) if not name or _is_file(line, path.parent) else (name.strip(), label)


def _is_file(name: str, folder: Path) -> bool:
    name = name.removeprefix("file://")
    return (Path(name).expanduser() if name.startswith("~/") else folder / name).is_file()


def _separated(separator: str) -> Callable[[Iterable[str], Path], Iterator[Pair]]:
    def read(file: Iterable[str], path: Path) -> Iterator[Pair]:
        # Spreadsheets write semicolons where the comma is in numbers.
        lines = iter(file)
        first = next((line for line in lines if line.strip()), "")
        used = separator if separator in first or ";" not in first else ";"
        rows = (
            row for row in csv.reader(chain([first], lines), delimiter=used, strict=True) if any(map(str.strip, row))
        )
        at, label = 0, 1
        for number, row in enumerate(rows):
            names = [cell.strip().lower() for cell in row]
            if not number and set(names) & set(PATHS):
                at = next(names.index(name) for name in PATHS if name in names)
                label = next((names.index(name) for name in LABELS if name in names), len(names))
            elif len(row) <= at:
                raise ValueError(f"row {number + 1} has no path")
            else:
                yield row[at].strip(), row[label] if label < len(row) else None

    return read


def _objects(file: Iterable[str], path: Path) -> Iterator[Pair]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value: Any = json.loads(line)
            except json.JSONDecodeError as error:  # whose own line is always the first
                raise ValueError(f"line {number} is not JSON ({error.msg}, character {error.colno})") from None
            name = next((value[key] for key in PATHS if key in value), None) if isinstance(value, dict) else None
            label = next((value[key] for key in LABELS if key in value), None) if isinstance(value, dict) else None
            if not isinstance(name, str):
                raise ValueError(f"line {number} is not an object with {' or '.join(PATHS[:3])}, and maybe {LABELS[0]}")
            if isinstance(label, bool) or not isinstance(label, str | int | float | None):
                raise ValueError(f"line {number} has the label {str(label)[:40]}, which is no class number or name")
            yield name, label


FORMS: dict[str, Callable[[Iterable[str], Path], Iterator[Pair]]] = {
    ".txt": _text,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".jsonl": _objects,
}


def read_pairs(path: Path) -> Sequence[Pair]:
    """Read the paths and labels of a list. Raises UserError that names the file if it cannot be read."""
    try:
        with path.open("rb") as binary:
            coding = "utf-16" if binary.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with path.open(newline="", encoding=coding, errors="surrogateescape") as file:
            return list(FORMS[path.suffix.lower()](file, path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"{path} is not a list of images: {error}") from None


def _list(path: Path, options: Options) -> SourceListing:
    pairs = [(_file_of(name), label) for name, label in read_pairs(path)]
    if not pairs:
        raise UserError(f"{path} is empty; it should list images, one a line")
    names = [name.encode(errors="replace" if _is_odd(name) else "surrogateescape").decode(errors="surrogateescape")
             for name, _ in pairs]  # fmt: skip
    labels, classes = numbered([label for _, label in pairs], str(path))
    samples = Samples(file_keys(names), labels, files=names)
    add_files(samples, path.parent)
    samples.defects = [
        (number, key, reason if names[number].startswith("/") else f"{reason} in {path.parent}, where the list is")
        for number, key, reason in samples.defects
    ]
    return samples.listing(sum(samples.sizes), classes)


def _file_of(name: str) -> str:
    """Return the file that a line names. Raises UserError for a URL."""
    if name.startswith("~"):
        return str(Path(name).expanduser()) if name.startswith("~/") else name
    if is_remote(name) and not name.startswith("file://"):
        raise UserError(f"{printable(name)} is in a list, and lists hold files; give shards by their URLs, or copy it")
    return name.removeprefix("file://")


def _is_odd(name: str) -> bool:
    """Return whether JSON has put half a character into a name, which no file has."""
    return any("\ud800" <= c < "\udc80" for c in name)


LIST = Kind(
    "list",
    lambda path: path.suffix.lower() in FORMS,
    _list,
    FileReader,
    FOLDER.beside,
    lambda path: path.parent,
)
