"""What a store is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from singer.errors import UserError

Place = Path | str
LOCK = "writer.lock"


class Ranges(NamedTuple):
    """out[places[i] : places[i] + lengths[i]] is to be filled from offsets[i] on in object names[which[i]].

    All but names are arrays of int64; out is contiguous uint8, which holds all places.
    """

    names: Sequence[str]
    which: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    out: np.ndarray
    places: np.ndarray


class Store(Protocol):
    """Objects by name, such as `journal/000001.json`. Safe to share between threads.

    What fails outside of singer (disk, network) is an OSError that names the place in one line.
    """

    @property
    def url(self) -> str: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        ...

    def read_ranges(self, ranges: Ranges) -> None:
        """Fastest if those of an object are together and in order. Raises UserError if one is missing or too short."""
        ...

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Durable and all or nothing, also after a crash. Raises UserError if the lock has gone to another run."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """{name: bytes} of all objects below the folder `prefix`; locks, logs and unfinished objects are none."""
        ...

    def remove(self, name: str) -> None:
        """Does nothing if there is no such object."""
        ...

    def clear(self, last: str = "") -> None:
        """Remove everything; the object `last` goes last, so that what is left of an interrupted run is known by it."""
        ...

    def child(self, name: str) -> "Store":
        """The store of the names below `name/`."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Held by one writer at a time; a second one gets a UserError."""
        ...


def is_remote(place: Place) -> bool:
    return "://" in str(place)


def missing(place: Place) -> UserError:
    return UserError(f"{place} is missing; run singer cache verify")


def too_short(place: Place) -> UserError:
    return UserError(f"{place} ends too early; run singer cache verify")
