"""Read segments: each one holds what one `cache-teacher` command added to a cache.

The first segment is at the root of the cache, later ones are in `parts/NNN`. A segment holds some blocks of one teacher
for some records (its rows), and never changes once it is complete.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.cache.format import COMPLETE, JOURNAL, PARTS, journal_file, zarr_shard_file
from pipeline.cache.index import Index, read_images, read_records
from pipeline.cache.manifest import Completion, Manifest, TeacherManifest, canonical, read_manifest
from pipeline.data import Images, content_hash
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.storage import Store
from pipeline.storage.json_files import is_sealed, read_json, validated
from singer.errors import UserError

_READERS = 16
Files = dict[str, dict[str, Any]]
"""{file of a Zarr shard: {"bytes": .., "sha256": ..}}."""


@dataclass(frozen=True)
class Segment:
    """A segment of a cache, complete or not. name: its folder within the cache, "" for the root."""

    name: str
    store: Store
    manifest: Manifest

    def entries(self) -> dict[int, dict[str, Any]]:
        """Read {Zarr shard: journal entry} of those that are done. Raises UserError naming a damaged entry."""
        present = self.store.sizes(JOURNAL)
        numbers = [n for n in range(self.manifest.zarr_shards) if journal_file(n) in present]
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(numbers, pool.map(self.entry, numbers), strict=True))

    def pending(self, done: Mapping[int, dict[str, Any]] | None = None) -> list[int]:
        """Return the Zarr shards that have no journal entry, or a file that is missing or has the wrong size."""
        done = self.entries() if done is None else done
        # Zarr reads a missing file as zeros, so a missing file must be noticed here.
        sizes = self.store.sizes()
        return [
            shard
            for shard in range(self.manifest.zarr_shards)
            if shard not in done
            or any(sizes.get(name) != known["bytes"] for name, known in done[shard]["files"].items())
        ]

    def entry(self, shard: int) -> dict[str, Any]:
        """Read the journal entry of a Zarr shard that is done. Raises UserError if it is damaged."""
        name = journal_file(shard)
        entry = read_json(self.store, name, "journal")
        try:
            whole = is_sealed(entry) and entry["records"] == list(self.manifest.zarr_shard_range(shard))
            whole &= all({"sha256", "bytes"} <= set(known) for known in entry["files"].values())
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{self.store.url}/{name} is damaged; run singer cache verify --repair")
        if entry.get("cache") != self.manifest.id():
            raise UserError(f"{self.store.url}/{name} belongs to another cache than {CACHE_MANIFEST} beside it")
        return entry

    def lacks(self) -> str | None:
        """Say in words why the segment is not complete; return None if it is."""
        shards, sizes = self.manifest.zarr_shards, self.store.sizes()
        done = {shard for shard in range(shards) if journal_file(shard) in sizes}
        for (_, shard), (name, known) in zip(self._places, self.files.items(), strict=True):
            if sizes.get(name) != known["bytes"]:
                done.discard(shard)
        if missing := shards - len(done):
            return f"{missing} of {shards} Zarr shards are missing"
        return None if self.completion else f"its {COMPLETE} is missing"

    @cached_property
    def completion(self) -> Completion | None:
        """Return the content of complete.json; None if there is no such file. Raises UserError if it is damaged."""
        file = f"{self.store.url}/{COMPLETE}"
        try:
            value = read_json(self.store, COMPLETE, "complete segment of a cache")
        except UserError:
            if COMPLETE in self.store.sizes():
                raise
            return None
        if not is_sealed(value):
            raise UserError(f"{file} is damaged: it does not match its own checksum; run singer cache verify --repair")
        del value["sha256"]
        found = validated(value, Completion, file)
        if found.part != self.manifest.id():
            raise UserError(f"{file} belongs to another cache than {CACHE_MANIFEST} beside it")
        return found

    @property
    def _complete(self) -> Completion:
        assert self.completion is not None
        return self.completion

    @cached_property
    def files(self) -> Files:
        """Return all files of Zarr shards of a complete segment; an incomplete one has none."""
        if self.completion is None:
            return {}
        forms, arrays = self.manifest.arrays(), self.completion.arrays
        return {
            zarr_shard_file(array, forms[array], shard): {
                "bytes": arrays[array][shard][0],
                "sha256": arrays[array][shard][1],
            }
            for array, shard in self._places
        }

    @property
    def _places(self) -> Iterator[tuple[str, int]]:
        """Yield (array, shard) for every file of `files`, in the same order."""
        arrays = {} if self.completion is None else self.completion.arrays
        return ((array, shard) for array, of_shards in arrays.items() for shard in range(len(of_shards)))

    @property
    def hash(self) -> str:
        """Return the SHA-256 of the images of a complete segment."""
        return self._complete.hash

    @property
    def id(self) -> str:
        """Return the id of a complete segment, by which refiners and runs refer to it.

        It is a hash of the manifest's id and of the images that were read.
        """
        return hashlib.sha256(f"{self.manifest.id()}\n{self.hash}".encode()).hexdigest()

    @property
    def records(self) -> int:
        """Return the number of records that a complete segment has for readers."""
        return self._complete.records

    @property
    def records_key(self) -> str:
        """Return a text that is equal for complete segments with the same readable images and the same views.

        Such segments hold other blocks, or features of another teacher, for the same records.
        """
        return canonical([self.hash, self.manifest.views])

    def stored(self, records: np.ndarray) -> np.ndarray:
        """Return where records are stored, given their numbers among the readable records.

        The two differ because the records of unreadable images are stored, too.
        """
        if not self._complete.unreadable:
            return records
        each = self.manifest.views_each
        image, view = np.divmod(records, each)
        # Readable image n comes after each unreadable image u with u - rank(u) <= n.
        left_out = np.asarray(self._complete.unreadable, dtype=np.int64)
        image = image + np.searchsorted(left_out - np.arange(len(left_out)), image, side="right")
        return np.asarray(image * each + view)

    def index(self) -> Index:
        """Read the images and views of a complete segment.

        Raises UserError if they are damaged or belong to another segment.
        """
        images = read_images(self.store)
        if self._complete.unreadable:
            images = images.select(np.delete(np.arange(len(images)), self._complete.unreadable))
        index = read_records(self.store, images, self.manifest)
        if len(index) != self.records or content_hash(images, index.digest) != self.hash:
            raise UserError(f"the index of {self.store.url} does not belong to its manifest; run singer cache verify")
        return index

    def digests(self) -> np.ndarray:
        """Return the digests of a complete segment's listed images, (images,) uint64; 0 if one cannot be decoded."""
        found = np.zeros(self.manifest.data.images, dtype=np.uint64)
        found[np.delete(np.arange(len(found)), self._complete.unreadable)] = self.index().digest
        return found

    def unreadable(self) -> Images:
        """Return the listed images of a complete segment that cannot be decoded."""
        return read_images(self.store).select(np.array(self._complete.unreadable, dtype=np.int64))


def read_segments(store: Store) -> list[Segment]:
    """Read all segments, complete or not. Raises UserError if there is no cache in the store."""
    return [Segment("", store, read_manifest(store)), *_appended(store)]


def _appended(store: Store) -> Iterator[Segment]:
    number = 1
    while True:
        name = segment_name(number)
        child = store.child(name)
        try:
            child.read(CACHE_MANIFEST)
        except FileNotFoundError:
            return
        yield Segment(name, child, read_manifest(child))
        number += 1


def segment_name(number: int) -> str:
    """Return the folder of a segment within the cache; "" for number 0."""
    return f"{PARTS}/{number:03d}" if number else ""


def segments_of(segments: Iterable[Segment], teacher: TeacherManifest) -> list[Segment]:
    """Return the segments that hold features of exactly this teacher."""
    return [s for s in segments if s.manifest.teacher.identity() == teacher.identity()]
