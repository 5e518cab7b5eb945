"""What every kind of source can do: list its images, read one where it is, and find the maps beside them."""

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.data.images import Keys
from pipeline.data.source_listing import NO_LABEL, SourceListing
from singer.errors import UserError

# A whole number, perhaps as a float; any number.
_NUMBER = re.compile(r"-?[0-9]+(\.0*)?")
_FLOAT = re.compile(r"-?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """How sources are listed.

    image_key: which field of a sample, or which column of a table, is the image; None: the usual ones. seed: of the
    order of a folder's images.
    """

    image_key: str | None = None
    seed: int = 0


class Reader(Protocol):
    """Reads the images of one container. It is safe to share between threads."""

    def read(self, file: str, offset: int, size: int, most: int, where: str) -> bytes:
        """Return the bytes of an image, or its first `most`. Raises UserError if they cannot be read.

        file, offset, size: see images.Images; where: the image, for messages.
        """
        ...

    def close(self) -> None:
        """Close what is open; a later read opens it again."""
        ...


# (container, extension, keys, files, offsets) of some images -> (files, offsets, sizes) of the maps beside them.
Beside = Callable[
    [Path, str, Sequence[str], Sequence[str], np.ndarray], tuple[Sequence[str] | None, np.ndarray, np.ndarray]
]


@dataclass(frozen=True)
class Kind:
    """A kind of source.

    word: what it is called in messages; takes: whether a path is of this kind; list: lists its images, with defects,
    and raises UserError if it is none; read: makes the reader of a container; container: where the images of a path
    are, by default in itself; named: whether Images.files are paths below the container; beside: finds the maps beside
    some images, and raises UserError with the first key that has none.
    """

    word: str
    takes: Callable[[Path], bool]
    list: Callable[[Path, Options], SourceListing]
    read: Callable[[Path], Reader]
    beside: Beside
    container: Callable[[Path], Path] = lambda path: path
    named: bool = False


@dataclass
class Samples:
    """Collects the samples of a source that is not a tar, in order."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[str] | None = None
    defects: list[tuple[int, str, str]] = field(default_factory=list)

    def listing(self, size: int, classes: Sequence[str], left_out: Mapping[str, int] | None = None) -> SourceListing:
        """Return the columns. Samples with a defect are unusable."""
        keys, usable = Keys.of(self.keys), np.ones(len(self.keys), dtype=np.bool_)
        usable[[number for number, _, _ in self.defects if number >= 0]] = False
        return SourceListing(
            size,
            keys.text,
            keys.ends,
            keys.hashes(),
            np.array(self.labels, dtype=np.int32),
            np.array(self.offsets, dtype=np.int64),
            np.array(self.sizes, dtype=np.int64),
            usable,
            self.defects,
            self.files,
            tuple(classes),
            left_out or {},
        )


def file_size(path: str) -> int:
    """Return the size of a regular file in bytes. Raises UserError that says what is wrong with it."""
    try:
        status = os.stat(path)  # noqa: PTH116 (millions of files: a Path takes longer)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UserError("does not exist") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is not a regular file")
    if not status.st_size:
        raise UserError("is empty")
    return status.st_size


def numbered(labels: Sequence[str | float | None], where: str) -> tuple[list[int], list[str]]:
    """Return labels as class numbers, and the names of classes, sorted, if labels are names.

    None, "", NaN and -1 are no label. Whole numbers may be written as floats, as pandas does where a label is missing.
    Raises UserError for a number that is not a class number. where: for messages.
    """
    texts = ["" if label is None else str(label).strip() for label in labels]
    known = {text: text for text in texts} | {"": "", "nan": "", "NaN": "", str(NO_LABEL): ""}
    if all(_NUMBER.fullmatch(text) for text in known.values() if text):
        known |= {text: text.partition(".")[0] for text in known.values() if text}
        known |= {text: "" for text, number in known.items() if number == str(NO_LABEL)}
    elif all(_FLOAT.fullmatch(text) for text in known.values() if text):
        part = next(text for text in known.values() if text and not _NUMBER.fullmatch(text))
        raise UserError(f"{where} has the label {part}, which is no class number; give whole numbers or names")
    texts = [known[text] for text in texts]
    given = {text for text in texts if text}
    if all(text.removeprefix("-").isdecimal() for text in given):
        wrong = [text for text in given if not 0 <= int(text) < 2**31]
        if wrong:
            raise UserError(f"{where} has the label {min(wrong)}; class numbers are 0 to {2**31 - 1}, and -1 for none")
        return [int(text) if text else NO_LABEL for text in texts], []
    classes = sorted(given)
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[text] if text else NO_LABEL for text in texts], classes
