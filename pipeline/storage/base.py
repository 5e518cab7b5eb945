"""The interface of a store."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from singer.errors import UserError

Place = Path | str
LOCK = "writer.lock"


class Ranges(NamedTuple):
    """Ranges to read: out[places[i] : places[i] + lengths[i]] from offsets[i] on in object names[which[i]].

    which, offsets, lengths and places are arrays of int64; out is contiguous uint8 and holds all places.
    """

    names: Sequence[str]
    which: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    out: np.ndarray
    places: np.ndarray


class Store(Protocol):
    """Objects by name, such as `journal/000001.json`. Safe to share between threads.

    Failures outside of singer (disk, network) are an OSError that names the place in one line.
    """

    @property
    def url(self) -> str:
        """Return the path or URL of the store, for messages."""
        ...

    def read(self, name: str) -> bytes:
        """Return a whole object. Raises FileNotFoundError if there is no such object."""
        ...

    def read_ranges(self, ranges: Ranges) -> None:
        """Fill ranges.out. Raises UserError if an object is missing or too short.

        It is fastest if the ranges of an object are together and in order.
        """
        ...

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write an object durably, all or nothing, also after a crash. Raises UserError if another run has the lock."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name: bytes} of all objects below the folder `prefix`, without locks, logs and unfinished objects."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object; do nothing if there is no such object."""
        ...

    def clear(self, last: str = "") -> None:
        """Remove everything. The object `last` goes last, so that the rest of an interrupted removal is recognised."""
        ...

    def child(self, name: str) -> "Store":
        """Return the store of the names below `name/`."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Hold the lock of the only writer until the block ends. Raises UserError if another writer holds it."""
        ...


def is_remote(place: Place) -> bool:
    """Return whether a place is a URL."""
    return "://" in str(place)


def missing(place: Place) -> UserError:
    """Return the error for an object that is missing."""
    return UserError(f"{place} is missing; run singer cache verify")


def too_short(place: Place) -> UserError:
    """Return the error for an object that ends too early."""
    return UserError(f"{place} ends too early; run singer cache verify")
