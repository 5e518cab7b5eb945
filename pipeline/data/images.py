"""The images in some shards and their places: columns in the order of the archives."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.data.decoding import Decoding
from pipeline.data.tars import NO_LABEL, key_hash
from singer.errors import UserError

CLASSES = "classes.json"

_KEYS_AT_ONCE = 1 << 18


class Keys(Sequence[str]):
    """Names of images, decoded when they are read: a million take little more memory than their letters.

    text: uint8, the UTF-8 bytes of all keys one after the other; ends: int64, where each key ends in text.
    Raises UserError if the two do not fit each other.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        if np.any(np.diff(ends, prepend=0) < 0) or (int(ends[-1]) if len(ends) else 0) != len(text):
            raise UserError(f"the ends of {len(ends)} keys do not divide their {len(text)} bytes")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        """Collect keys from strings."""
        text, ends = bytearray(), array("q")
        for key in keys:
            text += key.encode()
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), dtype=np.uint8), np.array(ends, dtype=np.int64))

    @classmethod
    def join(cls, several: Sequence["Keys"]) -> "Keys":
        """Join several lists of keys, one after the other."""
        starts = np.cumsum([0, *(len(keys.text) for keys in several)])
        ends = [keys.ends + start for keys, start in zip(several, starts.tolist(), strict=False)]
        return cls(np.concatenate([k.text for k in several]), np.concatenate(ends))

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

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Keys) and np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)
        )

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: np.ndarray) -> "Keys":
        """Take some of the keys, in the order of `rows`."""
        lengths = np.diff(self.ends, prepend=0)[rows]
        starts, ends = self.ends[rows] - lengths, np.cumsum(lengths)
        text = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        # An index for each letter takes eight times as much memory as the letters, so only some keys are done at a
        # time.
        for a in range(0, len(rows), _KEYS_AT_ONCE):
            own = slice(a, a + _KEYS_AT_ONCE)
            first = int(ends[a] - lengths[a])
            shift = np.repeat(starts[own] - (ends[own] - lengths[own]), lengths[own])
            text[first : first + len(shift)] = self.text[np.arange(first, first + len(shift)) + shift]
        return Keys(text, ends)

    def hashes(self) -> np.ndarray:
        """Return (n,) uint64: the first 8 bytes of the SHA-256 of each key. Equal hashes do not prove equal keys."""
        return np.fromiter((key_hash(key) for key in self._bytes()), dtype=np.uint64, count=len(self))

    def _bytes(self) -> Iterator[bytes]:
        start, text = 0, self.text.tobytes()
        for end in self.ends.tolist():
            yield text[start:end]
            start = end


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
    """The place of every image in some shards: parallel columns in the order of shards and members.

    paths, shard_sizes: the shards and their sizes in bytes; keys: names; labels: int32, NO_LABEL where there is none;
    shard: int32, index into paths; offset, size: int64, of the encoded image within its shard, in bytes; skipped:
    samples of the shards that were left out; decoding: how the images are decoded.
    """

    paths: tuple[Path, ...]
    shard_sizes: tuple[int, ...]
    keys: Keys
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    skipped: tuple[Skipped, ...] = ()
    decoding: Decoding = "upright"

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: np.ndarray) -> "Images":
        """Take some of the images, in the order of `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("labels", "shard", "offset", "size")}
        return replace(self, keys=self.keys.select(rows), **columns)

    def place_hash(self) -> str:
        """Hash shard names, keys, labels and places of all images; the bytes of pixels are not read."""
        digest = hashlib.sha256("\0".join(p.name for p in self.paths).encode())
        for column, kind in ((self.shard, "<i4"), (self.offset, "<i8")):
            digest.update(column.astype(kind, copy=False).tobytes())
        digest.update(listing_hash(self).encode())
        return digest.hexdigest()


def listing_hash(images: Images) -> str:
    """Hash keys, labels and sizes of all images with SHA-256: the same wherever they are, and in whatever shards.

    It is known before any image is read. It covers the bytes of all keys, their ends (int64), labels (int32) and
    sizes (int64).
    """
    return _hash(images, images.size.astype("<i8", copy=False))


def content_hash(images: Images, digest: np.ndarray) -> str:
    """Hash keys, labels and digests of all images with SHA-256, as listing_hash but with digests in place of sizes.

    digest: (n,) uint64, see image_digest.
    """
    assert len(digest) == len(images)
    return _hash(images, digest.astype("<u8", copy=False))


def _hash(images: Images, column: np.ndarray) -> str:
    whole = hashlib.sha256(images.keys.text.data)
    for part in (images.keys.ends.astype("<i8", copy=False), images.labels.astype("<i4", copy=False), column):
        whole.update(np.ascontiguousarray(part).data)
    return whole.hexdigest()


def image_digest(data: bytes) -> int:
    """Return the first 8 bytes (little-endian) of the SHA-256 of an encoded image."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def require_labels(images: Images, what: str) -> None:
    """Raise UserError if an image has no label. what: the data, for the message."""
    missing = np.flatnonzero(images.labels == NO_LABEL)
    if len(missing):
        raise UserError(
            f"{what}: {len(missing)} of {len(images)} images have no .cls label, the first is "
            f"{images.keys[int(missing[0])]!r}"
        )
