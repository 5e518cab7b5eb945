"""What every layout lists of a data set: its images with their labels and maps, and the names of classes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.formats import IMAGE_EXTENSIONS, START_BYTES, format_of
from pipeline.data.importers.walk import walk
from singer.errors import UserError

# The values are the extensions in shards.
KEPT = {f".{extension}": extension for extension in IMAGE_EXTENSIONS} | {".jpeg": "jpg"}

# The pixels of a map -> those that are stored.
Convert = Callable[[np.ndarray], np.ndarray]


# There may be millions of entries, and a Path takes much more memory than a string.
@dataclass(frozen=True, slots=True)
class Entry:
    """An image.

    label: its class number, if it has one; beside: {extension: file} of its mask and depth map; key: its name in
    shards, by default that of its file; read: returns its bytes and its name in messages, if it is no file of its own.
    """

    file: str
    label: int | None = None
    beside: Mapping[str, str] | None = None
    key: str | None = None
    read: Callable[[], tuple[bytes, str]] | None = None


@dataclass(frozen=True)
class Listing:
    """What a data set holds.

    classes: names by label, empty if they are not known; convert: {extension: how such maps are changed}; left_out:
    {kind: how many files of the data set's folders are not images}, see walk.Found; class_root: the folder whose
    sub-folders are the classes, if these are known from there.
    """

    entries: list[Entry]
    classes: list[str]
    convert: Mapping[str, Convert] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=Counter)
    class_root: Path | None = None


@dataclass(frozen=True)
class Importer:
    """How a data set is laid out on disk. splits: those to choose from, if any.

    entries: lists a split below the root folder (split "" if there are none). It raises UserError that names the file
    that is missing.
    """

    entries: Callable[[Path, str], Listing]
    splits: tuple[str, ...] = ()


def existing(file: Path, why: str = "this layout needs it") -> Path:
    """Return the file. Raises UserError if there is none."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; {why}")
    return file


def is_image(path: str) -> bool:
    """Return whether a file begins as an image does."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (many files: a Path takes longer)
            return format_of(file.read(START_BYTES)) is not None
    except OSError:
        return False


def images_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the images directly in a folder, sorted by name, and what is left out there.

    Raises UserError if there are none.
    """
    found = walk(folder, KEPT, deep=False) if folder.is_dir() else None
    if found is None or not found.files:
        raise UserError(f"{folder} holds no images; this layout needs them there")
    return [folder / name for name in found.files], found.left_out


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file that are not blank. Raises UserError if it is missing, empty or no text."""
    try:
        lines = [line.strip() for line in existing(file).read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{file} is empty")
    return lines


def read_mat(file: Path, name: str) -> np.ndarray:
    """Read a variable of a MATLAB file, without dimensions of size one. Raises UserError that names both."""
    from scipy.io import loadmat  # imported late, as few layouts need it

    existing(file)
    try:
        from scipy.io import loadmat  # late, as it takes half a second

        return np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except KeyError:
        raise UserError(f"{file} has no variable {name!r}") from None
    except Exception as error:  # loadmat raises many kinds of errors on broken data
        raise UserError(f"{file} cannot be read as a MATLAB file: {error or type(error).__name__}") from None
