"""The images in some shards, folders or tables, and their places: columns in the order of these."""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np

from pipeline.config import MAX_PIXELS
from pipeline.data.source_listing import NO_LABEL, key_hash
from singer.errors import UserError

CLASSES = "classes.json"

_KEYS_AT_ONCE = 1 << 18
# Heads and scores have a column for each number up to the largest, so a date or an identifier would fill the memory.
_MANY_CLASSES, _CLASSES_AN_IMAGE = 100_000, 10


class Keys(Sequence[str]):
    """Names of images, decoded when they are read: a million take little more memory than their letters.

    text: uint8, the UTF-8 bytes of all keys one after the other; ends: int64, where each key ends in text. Names of
    files may have other bytes, too; as in Python's os module, these become surrogates. Raises UserError if text and
    ends do not fit each other.
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
            text += key.encode(errors="surrogateescape")
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), dtype=np.uint8), np.array(ends, dtype=np.int64))

    @classmethod
    def empty(cls, count: int) -> "Keys":
        """Return `count` empty texts."""
        return cls(np.zeros(0, dtype=np.uint8), np.zeros(count, dtype=np.int64))

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
        return self.text[start : int(self.ends[numbers])].tobytes().decode(errors="surrogateescape")

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


def find_hashes(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each wanted hash the row of `hashes` that has it, (n,) int64, -1 if none has; see Keys.hashes."""
    if not len(hashes):
        return np.full(len(wanted), -1)
    order = np.argsort(hashes)
    rows = order[np.minimum(np.searchsorted(hashes[order], wanted), len(order) - 1)]
    return np.where(hashes[rows] == wanted, rows, -1)


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
    """The place of every image in some containers: parallel columns in the order of the containers and their members.

    A container is a tar (a shard), a folder of files or a table; pipeline/data/sources/ has the kinds. paths,
    container_sizes: the containers and the sizes of their files in bytes; keys: names; labels: int32, NO_LABEL where
    there is none; container: int32, index into paths; offset, size: int64, of the encoded image within its container,
    in bytes (of a table: the number of the row); files: the name of each image's file in a folder, or column in a
    table, "" in tars, or None if all are tars; classes: names by label, empty if they are not known; skipped: samples
    that were left out; max_pixels: larger ones are broken; left_out: {kind: how many other files the folders hold};
    given: what was listed, as two lists of one folder differ; empty in a cache.
    """

    paths: tuple[Path, ...]
    container_sizes: tuple[int, ...]
    keys: Keys
    labels: np.ndarray
    container: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    skipped: tuple[Skipped, ...] = ()
    files: Keys | None = None
    classes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS
    given: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: np.ndarray) -> "Images":
        """Take some of the images, in the order of `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("labels", "container", "offset", "size")}
        files = None if self.files is None else self.files.select(rows)
        return replace(self, keys=self.keys.select(rows), files=files, **columns)

    def place_hash(self) -> str:
        """Hash shard names, keys, labels and places of all images; the bytes of pixels are not read."""
        digest = hashlib.sha256("\0".join(p.name for p in self.paths).encode(errors="surrogateescape"))
        for column, kind in ((self.container, "<i4"), (self.offset, "<i8")):
            digest.update(column.astype(kind, copy=False).tobytes())
        if self.files is not None:
            digest.update(self.files.text.tobytes())
        digest.update(listing_hash(self).encode())
        return digest.hexdigest()


def join_files(several: Sequence[Images]) -> Keys | None:
    """Join the names of files, "" for images that are none; None if all are such."""
    if all(images.files is None for images in several):
        return None
    return Keys.join([Keys.empty(len(i)) if i.files is None else i.files for i in several])


Labelled = tuple[np.ndarray, tuple[str, ...]]


def join_classes(several: Sequence[Labelled], paths: Sequence[Path]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Join the labels and class names of sources. Where sources have other classes, these are numbered anew, sorted.

    A classes.json beside a shard names its classes. Raises UserError if some labelled sources name their classes and
    others do not.
    """
    files = {path.with_name(CLASSES) for path, (_, classes) in zip(paths, several, strict=True) if not classes}
    beside = {file: tuple(read_classes(file)) for file in files if file.is_file()}
    if not beside and not any(classes for _, classes in several):
        return np.concatenate([labels for labels, _ in several]), ()
    known: dict[tuple[str, ...], Path] = {}
    parts: list[Labelled] = []
    for (labels, own), path in zip(several, paths, strict=True):
        classes = own or beside.get(path.with_name(CLASSES), ())
        labelled = bool(np.any(labels != NO_LABEL))
        if labelled and int(labels.max()) >= len(classes):
            raise UserError(
                f"{path} has class {int(labels.max())}, and {len(classes) or 'no'} names of classes, which another "
                f"source has; write all names, in order, to {path.with_name(CLASSES)} as a list in JSON"
            )
        if labelled:
            known.setdefault(classes, path)
        parts.append((labels, classes))
    together = next(iter(known), ()) if len(known) < 2 else tuple(sorted({name for names in known for name in names}))
    return np.concatenate([_renumbered(labels, classes, together) for labels, classes in parts]), together


def _renumbered(labels: np.ndarray, before: Sequence[str], after: Sequence[str]) -> np.ndarray:
    """Return labels, (n,) int32, by the numbers that classes have in another list; all are in both."""
    if tuple(before) == tuple(after) or not np.any(labels != NO_LABEL):
        return labels
    numbers = {name: number for number, name in enumerate(after)}
    # The last place is for NO_LABEL, -1.
    table = np.array([*(numbers.get(name, NO_LABEL) for name in before), NO_LABEL], dtype=np.int32)
    renumbered: np.ndarray = table[labels]
    return renumbered


def numbered_as(images: Images, classes: Sequence[str]) -> Images:
    """Return images whose classes have names with the numbers of other classes; further names come after these."""
    if not images.classes or not classes or images.classes == tuple(classes):
        return images
    after = (*classes, *sorted(set(images.classes) - set(classes)))
    return replace(images, labels=_renumbered(images.labels, images.classes, after), classes=after)


def longest_classes(several: Iterable[Images]) -> tuple[str, ...]:
    """Return the classes of the segments of a cache: each that is appended has those of the earlier ones first."""
    return max((images.classes for images in several), key=len)


def read_classes(file: Path) -> list[str]:
    """Read the names of classes: a list, or numbers by names. Raises UserError if the file cannot be read."""
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and sorted(map(str, found.values())) == sorted(map(str, range(len(found)))):
        found = sorted(found, key=lambda name: int(found[name]))
    if not isinstance(found, list) or not all(isinstance(name, str | int) for name in found):
        raise UserError(f"{file} is damaged: it holds no list of classes")
    return list(map(str, found))


def accepted(images: Images) -> Images:
    """Return images of a cache without a limit of size: they were accepted when they were cached."""
    return replace(images, max_pixels=sys.maxsize)


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


def check_class_numbers(images: Images) -> None:
    """Raise UserError if a label of --train is so large that it can be no class number."""
    largest = int(np.argmax(images.labels))
    if int(images.labels[largest]) >= max(_MANY_CLASSES, _CLASSES_AN_IMAGE * len(images)):
        raise UserError(
            f"--train: label {int(images.labels[largest])} of {images.keys[largest]!r} is no class number of "
            f"{len(images)} images; number classes from 0 on, or give names"
        )
