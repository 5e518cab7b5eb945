"""What users give for their images -> the sources that it names: the one place that does so, for every command."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.formats import KEPT
from pipeline.data.sources.tables import SUFFIXES as TABLES
from pipeline.data.walk import names_below, printable, suffix_of, walk
from pipeline.storage import is_remote
from pipeline.storage.downloads import download
from singer.errors import UserError

Spec = str | Path | Sequence[str | Path]
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".lzma", ".lz", ".z")
# Each of these is short for .tar and one of those.
_SHORT = (".tgz", ".tzst", ".tbz", ".tbz2", ".txz", ".tlz", ".taz")
_TARS = (".tar", *_SHORT, *_COMPRESSED)
# What people take for images, too. Anything else with an unknown suffix may be a shard.
_NO_SOURCES = {".json": "one JSON object a line in a file .jsonl is read", ".zip": "unpack it, and give the folder"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)+\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_LETTERS = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
_MOST = 1_000_000
# Hugging Face `datasets` names the files of a split like this.
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")


def resolve(spec: Spec) -> list[Path]:
    """Return the sources that a specification names, in order: shards, folders of images, lists and tables.

    A specification is one or several of: a file; a folder of images, shards or tables; `~`; a glob; a brace range
    (`train-{0000..0004}.tar`); a URL, which is copied to this machine first. A name that exists is taken as it is,
    also with letters of globs in it. Raises UserError, which quotes what was given, if it names nothing, a file that is
    missing, or a source twice.
    """
    given = [spec] if isinstance(spec, str | Path) else list(spec)
    paths = [path for one in given for path in _sources(os.fspath(one))]
    if not paths:
        raise UserError("no images given")
    twice, count = Counter(path.resolve() for path in paths).most_common(1)[0]
    if count > 1:
        raise UserError(f"{twice} is given twice")
    return paths


def _sources(given: str) -> list[Path]:
    """Return the sources that one specification names."""
    if not given.strip():
        raise UserError("no images given: a name is empty, as of a variable of the shell that is not set")
    if "::" in given and not os.path.lexists(given):
        raise UserError(f"{given!r} names several; give each one by itself")
    if given.startswith("pipe:"):
        raise UserError(
            f"{given!r}: a pipe can be read once, and images are read by their place, again and again; write its "
            "output to a file, and give that"
        )
    if is_remote(given) and not given.startswith("file://"):
        return [path for url in braces(given) for path in download(url)]
    found = _paths(given.removeprefix("file://"), given)
    missing = [path for path in found if not path.exists()]
    if missing:
        more = f" (nor {len(missing) - 1} more)" * (len(missing) > 1)
        raise UserError(f"{_quoting(given, missing[0])}{missing[0]} does not exist{more}")
    return [source for path in found for source in (_in_folder(path, given) if path.is_dir() else [_file(path)])]


def _paths(text: str, given: str) -> list[Path]:
    """Expand `~`, braces and globs."""
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError:
            raise UserError(f"{given!r}: there is no such user, or no home folder") from None
    here, rest = _existing(text)
    if not rest:
        return [Path(here)]
    paths: list[Path] = []
    for name in braces(rest):
        there, pattern = _existing(here + name)
        if glob.has_magic(pattern):
            found = sorted(glob.glob(glob.escape(there) + pattern, recursive=True))  # noqa: PTH207 (absolute, too)
            if not os.access(there or ".", os.R_OK | os.X_OK):
                raise UserError(f"{given}: the folder {there} cannot be read: Permission denied")
            if not found:
                raise UserError(f"nothing matches {given!r}; quote it, and look at what is in its folder")
            paths += map(Path, found)
        else:
            paths.append(Path(there + pattern))
    return paths


def _existing(text: str) -> tuple[str, str]:
    """Split a path after its longest beginning that exists, at a slash: a name that exists is not a pattern."""
    at = len(text)
    while at >= 0:
        if at and os.path.lexists(text[:at]):
            return text[: at + 1], text[at + 1 :]
        at = text.rfind("/", 0, at)
        if not at:
            return "/", text[1:]
    return "", text


def braces(text: str) -> Iterator[str]:
    """Expand `{a,b}` and `{01..12}` as shells do, from left to right; other braces stay.

    Raises UserError for more than a million names, and for choices within choices.
    """
    if any("," in _BRACES.sub("", found[0][1:-1]) for found in _NESTED.finditer(text)):
        raise UserError(f"{text!r} has choices in braces within others, which are not expanded; give several patterns")
    for found in _BRACES.finditer(text):
        content = found[1]
        numbers = _RANGE.fullmatch(content)
        if numbers:
            choices = _numbers(text, *numbers.groups())
        elif letters := _LETTERS.fullmatch(content):
            choices = _letters(*filter(None, letters.groups()))
        elif "," in content:
            choices = content.split(",")
        else:
            continue
        for choice in choices:
            for rest in braces(text[found.end() :]):
                yield f"{text[: found.start()]}{choice}{rest}"
        return
    yield text


def _letters(first: str, last: str) -> list[str]:
    a, b = ord(first), ord(last)
    return [chr(letter) for letter in range(a, b + (1 if b >= a else -1), 1 if b >= a else -1)]


def _numbers(text: str, first: str, last: str, step: str | None) -> list[str]:
    a, b = int(first), int(last)
    if abs(b - a) > _MOST:
        raise UserError(f"{text!r} names more than {_MOST} files; give a glob, such as '*.tar'")
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    stride = max(1, int(step or 1)) * (1 if b >= a else -1)
    return [f"{number:0{width}d}" for number in range(a, b + (1 if b >= a else -1), stride)]


def _quoting(given: str, path: Path) -> str:
    return "" if given == str(path) else f"{given!r}: "


def _file(path: Path) -> Path:
    if suffix_of(path.name) in KEPT:
        raise UserError(f"{path} is an image; give its folder, or a list of images (.txt, .csv, .tsv or .jsonl)")
    if remedy := _NO_SOURCES.get(suffix_of(path.name)):
        raise UserError(f"{path} is no folder, shard, list or table: {remedy}")
    return path


def _in_folder(path: Path, given: str) -> list[Path]:
    """Return the shards or tables in a folder, or the folder itself: then it holds images."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise UserError(f"{given!r} has the splits {', '.join(splits)}; give one: {path / (splits or ['SPLIT'])[0]}")
    found = walk(path, (*_TARS, *TABLES), deep=False)
    tables = [name for name in found.files if suffix_of(name) in TABLES and not name.startswith("cache-")]
    tars = _shards(found.files)
    if tars and tables:
        raise UserError(f"{given!r} holds shards and tables; give one: '{path}/*{suffix_of(tars[0])}'")
    if not found.files and "data" in found.folders and walk(path / "data", TABLES, deep=False).files:
        return _in_folder(path / "data", given)
    if tables:
        splits = sorted({match[1] for name in tables if (match := _SPLIT.fullmatch(name.rpartition(".")[0]))})
        if len(splits) > 1:
            raise UserError(f"{given!r} has the splits {', '.join(splits)}; give one: '{path}/{splits[0]}-*'")
    if tars and (image := _an_image(path)):
        raise UserError(
            f"{given!r} holds shards, such as {tars[0]}, and images, such as {printable(image)}; for the shards give "
            f"'{path}/*{suffix_of(tars[0])}', or move one of the two"
        )
    if not tars and not tables and not _an_image(path):
        _look_deeper(path, given)
    return [path / name for name in tars or tables] or [path]


def _shards(files: Sequence[str]) -> list[str]:
    """Return the shards among the files of a folder, without compressed ones that are also there unpacked."""
    names = set(files)
    tars = []
    for name in files:
        suffix = suffix_of(name)
        unpacked = f"{name[: -len(suffix)]}{'.tar' if suffix in _SHORT else ''}"
        if suffix == ".tar" or (suffix_of(unpacked) == ".tar" and unpacked not in names):
            tars.append(name)
    return tars


def _an_image(path: Path) -> str | None:
    """Return the name of an image file in a folder or below it, None if there is none."""
    return next((name for name in names_below(path) if suffix_of(name) in KEPT), None)


def _look_deeper(path: Path, given: str) -> None:
    """Raise UserError that names the shards or tables in sub-folders, if there are any."""
    names = (name for name in names_below(path) if suffix_of(name) in (*_TARS, *TABLES))
    found = next((name for name in names if suffix_of(name) in TABLES or _shards([name])), None)
    if found is not None:
        raise UserError(
            f"{given!r} holds no images, and its sub-folders hold shards or tables, such as {printable(found)}; give "
            f"one of these folders, or all: '{path}/**/*{suffix_of(found)}'"
        )
