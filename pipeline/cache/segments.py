"""Parts: what one `cache-teacher` command added to a cache. The first lies at its root, later ones in `parts/NNN`.

A part holds some blocks of one teacher for some records (its rows), and never changes once it is complete.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.cache.format import COMPLETE, JOURNAL, MANIFEST, PARTS, journal_file, shard_file
from pipeline.cache.index import Index, content_hash_2, read_images, read_index_2, read_records
from pipeline.cache.manifest import Completion, Manifest, TeacherManifest, canonical, read_manifest
from pipeline.data import Images, content_hash
from pipeline.storage import Store
from pipeline.storage.outputs import (
    is_sealed,
    read_json,
    validated,
)
from singer.errors import UserError

_READERS = 16
Files = dict[str, dict[str, Any]]
"""{name: {"bytes": .., "sha256": ..}} of shard files."""


@dataclass(frozen=True)
class Segment:
    """name: its folder within the cache, "" for the root."""

    name: str
    store: Store
    manifest: Manifest

    def entries(self) -> dict[int, dict[str, Any]]:
        """{shard: journal entry} of the shards that are done. Raises UserError naming a damaged entry."""
        present = self.store.sizes(JOURNAL)
        numbers = [n for n in range(self.manifest.shards) if journal_file(n) in present]
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(numbers, pool.map(self.entry, numbers), strict=True))

    def pending(self, done: Mapping[int, dict[str, Any]] | None = None) -> list[int]:
        """Shards without a journal entry, or with a file missing or of the wrong size."""
        done = self.entries() if done is None else done
        # Zarr reads a missing file as zeros, so its absence must be noticed here.
        sizes = self.store.sizes()
        return [
            shard
            for shard in range(self.manifest.shards)
            if shard not in done
            or any(sizes.get(name) != known["bytes"] for name, known in done[shard]["files"].items())
        ]

    def entry(self, shard: int) -> dict[str, Any]:
        """The journal entry of a shard that is done. Raises UserError if it is damaged."""
        name = journal_file(shard)
        entry = read_json(self.store, name, "journal")
        try:
            whole = is_sealed(entry) and entry["records"] == list(self.manifest.shard_range(shard))
            whole &= all({"sha256", "bytes"} <= set(known) for known in entry["files"].values())
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{self.store.url}/{name} is damaged; run singer cache verify --repair")
        if entry.get("cache") != self.manifest.id():
            raise UserError(f"{self.store.url}/{name} belongs to another cache than {MANIFEST} beside it")
        return entry

    def lacks(self) -> str | None:
        """What keeps the part from being complete, in words; None if nothing does."""
        shards = self.manifest.shards
        if self.manifest.version == 2:
            missing = len(self.pending())
        else:
            sizes = self.store.sizes()
            done = {shard for shard in range(shards) if journal_file(shard) in sizes}
            for (_, shard), (name, known) in zip(self._places, self.files.items(), strict=True):
                if sizes.get(name) != known["bytes"]:
                    done.discard(shard)
            missing = shards - len(done)
        if missing:
            return f"{missing} of {shards} shards are missing"
        return None if self.manifest.version == 2 or self.completion else f"its {COMPLETE} is missing"

    @cached_property
    def completion(self) -> Completion | None:
        """None if the part is not complete, or of version 2. Raises UserError if the file is damaged."""
        file = f"{self.store.url}/{COMPLETE}"
        try:
            value = read_json(self.store, COMPLETE, "complete part of a cache")
        except UserError:
            if COMPLETE in self.store.sizes():
                raise
            return None
        if not is_sealed(value):
            raise UserError(f"{file} is damaged: it does not match its own checksum; run singer cache verify --repair")
        del value["sha256"]
        found = validated(value, Completion, file)
        if found.part != self.manifest.id():
            raise UserError(f"{file} belongs to another cache than {MANIFEST} beside it")
        return found

    @property
    def _complete(self) -> Completion:
        assert self.completion is not None
        return self.completion

    @cached_property
    def files(self) -> Files:
        """All shard files of a complete part; none of one that is not."""
        if self.manifest.version == 2:
            return {n: f for entry in self.entries().values() for n, f in entry["files"].items()}
        if self.completion is None:
            return {}
        forms, arrays = self.manifest.arrays(), self.completion.arrays
        return {
            shard_file(array, forms[array], shard): {
                "bytes": arrays[array][shard][0],
                "sha256": arrays[array][shard][1],
            }
            for array, shard in self._places
        }

    @property
    def _places(self) -> Iterator[tuple[str, int]]:
        """(array, shard) of every file of `files`, in its order."""
        arrays = {} if self.completion is None else self.completion.arrays
        return ((array, shard) for array, of_shards in arrays.items() for shard in range(len(of_shards)))

    @property
    def hash(self) -> str:
        """SHA-256 of the images of a complete part."""
        return self.manifest.data.hash if self.manifest.version == 2 else self._complete.hash

    @property
    def id(self) -> str:
        """The name by which refiners and runs refer to a complete part: of the manifest, and of what was read."""
        own = self.manifest.id()
        return own if self.manifest.version == 2 else hashlib.sha256(f"{own}\n{self.hash}".encode()).hexdigest()

    @property
    def records(self) -> int:
        """How many records a complete part has for readers."""
        return self.manifest.records if self.manifest.version == 2 else self._complete.records

    @property
    def rows(self) -> str:
        """Which images and views: equal for complete parts that hold other blocks of the same records."""
        return canonical([self.hash, self.manifest.views])

    def stored(self, records: np.ndarray) -> np.ndarray:
        """Where the readable records of these numbers are stored: those of unreadable images have a place, too."""
        if self.manifest.version == 2 or not self._complete.unreadable:
            return records
        each = self.manifest.views_each
        image, view = np.divmod(records, each)
        # Image n of the readable ones comes after all unreadable ones u of which u - rank(u) <= n.
        left_out = np.asarray(self._complete.unreadable, dtype=np.int64)
        image = image + np.searchsorted(left_out - np.arange(len(left_out)), image, side="right")
        return np.asarray(image * each + view)

    def index(self) -> Index:
        """Images and views of a complete part. Raises UserError if they are damaged or not those of the part."""
        if self.manifest.version == 2:
            index = read_index_2(self.store)
            same = content_hash_2(index.images, index.digest) == self.hash
        else:
            images = read_images(self.store)
            if self._complete.unreadable:
                images = images.select(np.delete(np.arange(len(images)), self._complete.unreadable))
            index = read_records(self.store, images, self.manifest)
            same = content_hash(images, index.digest) == self.hash
        if len(index) != self.records or not same:
            raise UserError(f"the index of {self.store.url} does not belong to its manifest; run singer cache verify")
        return index

    def digests(self) -> np.ndarray:
        """(listed images,) uint64: digests of a complete part's images, 0 where one cannot be decoded."""
        found = np.zeros(self.manifest.data.images, dtype=np.uint64)
        found[np.delete(np.arange(len(found)), self._complete.unreadable)] = self.index().digest
        return found

    def unreadable(self) -> Images:
        """The listed images of a complete part that cannot be decoded."""
        return read_images(self.store).select(np.array(self._complete.unreadable, dtype=np.int64))


def read_segments(store: Store) -> list[Segment]:
    """All parts, complete or not. Raises UserError if there is no cache in the store."""
    return [Segment("", store, read_manifest(store)), *_appended(store)]


def _appended(store: Store) -> Iterator[Segment]:
    number = 1
    while True:
        name = segment_name(number)
        child = store.child(name)
        try:
            child.read(MANIFEST)
        except FileNotFoundError:
            return
        yield Segment(name, child, read_manifest(child))
        number += 1


def segment_name(number: int) -> str:
    return f"{PARTS}/{number:03d}" if number else ""


def mine(parts: Iterable[Segment], teacher: TeacherManifest) -> list[Segment]:
    """The parts that hold features of this very teacher."""
    return [p for p in parts if p.manifest.teacher.identity() == teacher.identity()]
