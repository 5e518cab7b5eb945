"""What layouts of data sets share: how one is declared, and how its files are read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.entries import Listing
from pipeline.data.formats import KEPT
from pipeline.data.walk import walk
from singer.errors import UserError


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
    existing(file)
    try:
        from scipy.io import loadmat  # late, as it takes half a second

        return np.atleast_1d(loadmat(file, squeeze_me=True)[name])
    except KeyError:
        raise UserError(f"{file} has no variable {name!r}") from None
    except Exception as error:  # loadmat raises many kinds of errors on broken data
        raise UserError(f"{file} cannot be read as a MATLAB file: {error or type(error).__name__}") from None
