"""Which images some shards hold, and where: columns in the order of the archives."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.tars import NO_LABEL
from singer.errors import UserError


class Keys(Sequence[str]):
    """Names of images, decoded when asked for: a million take little more than their letters.

    text: uint8, the UTF-8 bytes of all keys one after the other; ends: int64, where each key ends in text.
    Raises UserError if these do not fit each other.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        if np.any(np.diff(ends, prepend=0) < 0) or (int(ends[-1]) if len(ends) else 0) != len(text):
            raise UserError(f"the ends of {len(ends)} keys do not divide their {len(text)} bytes")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        text, ends = bytearray(), array("q")
        for key in keys:
            text += key.encode()
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...
    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        numbers = range(len(self))[item]  # settles negative numbers, steps and IndexError
        if isinstance(numbers, range):
            return tuple(self[number] for number in numbers)
        start = int(self.ends[numbers - 1]) if numbers else 0
        return self.text[start : int(self.ends[numbers])].tobytes().decode()


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, or (key "") the unreadable rest of a shard. shard: file name."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}' {self.reason}" if self.key else f"{self.shard} {self.reason}"


@dataclass(frozen=True)
class Images:
    """Where every image of some shards is: parallel columns in the order of shards and members.

    paths, shard_sizes: the shards and their sizes in bytes; keys: names; labels: int32, NO_LABEL where there is none;
    shard: int32, index into paths; offset, size: int64, of the encoded image within its shard, in bytes; skipped:
    what the shards hold besides and was left out.
    """

    paths: tuple[Path, ...]
    shard_sizes: tuple[int, ...]
    keys: Keys
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: np.ndarray) -> "Images":
        """Some of the images, in the order of `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("labels", "shard", "offset", "size")}
        return replace(self, keys=Keys.of(self.keys[i] for i in rows.tolist()), **columns)

    def place_hash(self) -> str:
        """SHA-256 over keys, labels and places of all images; the bytes of pixels are not read.

        Version 1 of the cache format names its images by it.
        """
        digest = hashlib.sha256()
        digest.update("\0".join([*(p.name for p in self.paths), *self.keys]).encode())
        for column in (self.labels, self.shard, self.offset, self.size):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """What reading all images tells. digest: uint64, see content_hash; width, height: int32, pixels."""

    images: Images
    digest: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def select(self, rows: np.ndarray) -> "Survey":
        """Some of the images, in the order of `rows`."""
        return Survey(self.images.select(rows), self.digest[rows], self.width[rows], self.height[rows])


def image_digest(data: bytes) -> int:
    """The first 8 bytes (little-endian) of the SHA-256 of an encoded image."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def content_hash(images: Images, digest: np.ndarray) -> str:
    """SHA-256 over keys, labels and digests of all images: the same wherever they lie, whatever shards they are in.

    digest: (n,) uint64, the first 8 bytes (little-endian) of the SHA-256 of every encoded image.
    """
    assert len(digest) == len(images)
    whole = hashlib.sha256("\0".join(images.keys).encode())
    whole.update(images.labels.astype("<i4").tobytes())
    whole.update(digest.astype("<u8").tobytes())
    return whole.hexdigest()


def require_labels(images: Images, what: str) -> None:
    missing = np.flatnonzero(images.labels == NO_LABEL)
    if len(missing):
        raise UserError(
            f"{what}: {len(missing)} of {len(images)} images have no .cls label, the first is "
            f"{images.keys[int(missing[0])]!r}"
        )
