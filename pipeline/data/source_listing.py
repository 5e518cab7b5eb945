"""What one source lists: a shard, a folder, a list of files or a table."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from singer.errors import UserError

NO_LABEL = -1


class ChangedImage(UserError):
    """An image is not what it was when it was listed, or this user may not read it."""


@dataclass(frozen=True)
class SourceListing:
    """The samples of a source as columns, with the unusable ones.

    size: size of its files, in bytes; key_text: uint8, UTF-8 of all keys; key_ends: int64; hashes: uint64, see
    key_hash; labels: int32; offsets, sizes: int64, places of the images, see images.Images; usable: bool; defects:
    (number of the sample, its key, what is wrong), in order, with number -1 for the source itself; files: the names of
    the files of a folder; classes: names by label, if they are known; left_out: {kind: how many other files}.
    """

    size: int
    key_text: np.ndarray
    key_ends: np.ndarray
    hashes: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    usable: np.ndarray
    defects: Sequence[tuple[int, str, str]]
    files: Sequence[str] | None = None
    classes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def key_hash(key: bytes) -> int:
    """Return the first 8 bytes (little-endian) of a key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
