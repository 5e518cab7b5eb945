"""Walk folders of files: links are followed, loops are not, and what is left out is counted by its kind."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from singer.errors import UserError

HIDDEN, BROKEN, LOOPS, SPECIAL = "hidden", "broken links", "looped folders", "no regular files"
UNNAMED = "without suffix"
_Identity = tuple[int, int]


@dataclass
class Found:
    """The files of some kinds below a folder.

    files: their names relative to the folder, in the order of their parts; folders: the names of its own sub-folders,
    sorted; left_out: {kind: how many other files}, where a kind is a suffix such as ".txt", or one of the names above.
    A hidden folder counts as one.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def walk(
    root: Path, suffixes: Collection[str], deep: bool = True, unnamed: Callable[[str], bool] = lambda path: False
) -> Found:
    """Find the files with these suffixes (small letters) below a folder, or only directly in it.

    unnamed: whether to take a file without a suffix, by its path. A link to a folder is followed, unless that folder is
    one that the way to the link goes through. Raises UserError for a folder that cannot be read.
    """
    found = Found()
    for name in _files(root, "", (_identity(root.stat()),), found, deep):
        suffix = suffix_of(name)
        if suffix in suffixes or (not suffix and unnamed(f"{root}/{name}")):
            found.files.append(name)
        else:
            found.left_out[suffix or UNNAMED] += 1
    return found


def names_below(root: Path) -> Iterator[str]:
    """Yield the names of all files below a folder, relative to it, in the order of their parts, as walk finds them."""
    return _files(root, "", (_identity(root.stat()),), Found(), True)


def _files(root: Path, prefix: str, way: tuple[_Identity, ...], found: Found, deep: bool) -> Iterator[str]:
    """Yield the names of all files in the folder `prefix` of the root, sorted, and count what is none.

    way: the identities of the folders that lead here.
    """
    try:
        with os.scandir(root / prefix) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {printable(root / prefix)} cannot be read: {error.strerror}") from None
    for entry in ordered:
        name = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            found.left_out[HIDDEN] += 1
        elif _is_broken(entry):
            found.left_out[BROKEN] += 1
        elif entry.is_file():
            yield name
        elif not entry.is_dir():
            found.left_out[SPECIAL] += 1
        elif (here := _identity(entry.stat())) in way:
            found.left_out[LOOPS] += 1
        else:
            if not prefix:
                found.folders.append(entry.name)
            if deep:
                yield from _files(root, f"{name}/", (*way, here), found, deep)


def _is_broken(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link that leads to nothing, to itself, or through a folder that is closed to us."""
    if not entry.is_symlink():
        return False
    try:
        entry.stat()
    except OSError:
        return True
    return False


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in small letters, with its dot; "" if there is none."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def stem_of(name: str) -> str:
    """Return the name of a file, with its folders, without its suffix."""
    return name[: len(name) - len(suffix_of(name))]


def as_text(left_out: Mapping[str, int]) -> str:
    """Return counts as text: `3 .txt, 1 .mov, 2 hidden`, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {printable(kind)}" for kind, count in ordered)


def printable(text: object) -> str:
    """Return a text on one line: control characters and bytes that are not UTF-8 are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
