"""Parts: what one `cache-teacher` command added to a cache. The first lies at its root, later ones in `parts/NNN`.

A part holds some blocks of one teacher for some records (its rows), and never changes once it is complete.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.cache.format import JOURNAL, MANIFEST, PARTS, Manifest, journal_file, read_manifest
from pipeline.outputs import is_sealed, read_json
from pipeline.stores import Store
from singer.errors import UserError

_READERS = 16


@dataclass(frozen=True)
class Part:
    """name: its folder within the cache, "" for the root."""

    name: str
    store: Store
    manifest: Manifest

    def entries(self) -> dict[int, dict[str, Any]]:
        """{shard: journal entry} of the shards that are done. Raises UserError naming a damaged entry."""
        present = sorted(self.store.sizes(JOURNAL))
        numbers = [n for n in range(self.manifest.shards) if journal_file(n) in set(present)]
        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(numbers, pool.map(self.entry, numbers), strict=True))

    def pending(self, done: Mapping[int, dict[str, Any]] | None = None) -> list[int]:
        """Shards without a journal entry, or with a file missing or of the wrong size."""
        sizes = self.store.sizes()
        done = self.entries() if done is None else done
        # Zarr reads a missing file as zeros, so its absence must be noticed here.
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
            whole = self.manifest.version == 1 or is_sealed(entry)
            whole &= entry["records"] == list(self.manifest.shard_range(shard))
            whole &= all({"sha256", "bytes"} <= set(known) for known in entry["files"].values())
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{self.store.url}/{name} is damaged; run singer cache verify --repair")
        if entry.get("cache") != self.manifest.id():
            raise UserError(f"{self.store.url}/{name} belongs to another cache than {MANIFEST} beside it")
        return entry


def read_parts(store: Store) -> list[Part]:
    """All parts, complete or not. Raises UserError if there is no cache in the store."""
    return [Part("", store, read_manifest(store)), *_appended(store)]


def _appended(store: Store) -> Iterator[Part]:
    number = 1
    while True:
        name = part_name(number)
        child = store.child(name)
        try:
            child.read(MANIFEST)
        except FileNotFoundError:
            return
        yield Part(name, child, read_manifest(child))
        number += 1


def part_name(number: int) -> str:
    return f"{PARTS}/{number:03d}" if number else ""
