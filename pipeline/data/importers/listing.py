"""What every layout lists of a data set: its images with their labels and maps, and the names of classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from singer.errors import UserError

# Images with these extensions are kept; the values are their extensions in shards.
KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
# These are stored as PNG: they are lossless, but webdataset users do not expect them in shards.
CONVERTED = (".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

# The pixels of a map -> those that are stored.
Convert = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """An image. label: its class number, if it has one; beside: {extension: file} of its mask and depth map."""

    file: Path
    label: int | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What a data set holds.

    classes: names by label, empty if they are not known; convert: {extension: how such maps are changed}.
    """

    entries: list[Entry]
    classes: list[str]
    convert: Mapping[str, Convert] = field(default_factory=dict)


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


def images_in(folder: Path) -> list[Path]:
    """List the images in a folder, sorted by name, without hidden ones. Raises UserError if there are none."""
    found = folder.iterdir() if folder.is_dir() else ()
    files = sorted(f for f in found if f.suffix.lower() in (*KEPT, *CONVERTED) and not f.name.startswith("."))
    if not files:
        raise UserError(f"{folder} holds no images; this layout needs them there")
    return files


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file that are not blank. Raises UserError if it is missing, empty or no text."""
    try:
        lines = [line.strip() for line in existing(file).read_text().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{file} is empty")
    return lines


def read_mat(file: Path, name: str) -> np.ndarray:
    """Read a variable of a MATLAB file, without dimensions of size one. Raises UserError that names both."""
    existing(file)
    try:
        from scipy.io import loadmat  # late, as it takes half a second

        return np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except KeyError:
        raise UserError(f"{file} has no variable {name!r}") from None
    except Exception as error:  # loadmat raises many kinds of errors on broken data
        raise UserError(f"{file} cannot be read as a MATLAB file: {error or type(error).__name__}") from None
