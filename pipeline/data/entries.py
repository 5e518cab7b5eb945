"""What is listed of a data set on disk: its images with their labels and maps, and the names of classes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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
