"""Writing a cache: whole Zarr shards, each by one process, each done once its journal entry is durable."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration
from pipeline.cache.format import (
    CALIBRATION,
    INDEX,
    JOURNAL,
    MANIFEST,
    TAIL,
    Index,
    Manifest,
    array_path,
    read_manifest,
    shard_file,
)
from pipeline.outputs import read_json, write_atomic, write_json, write_tensors


def create_cache(
    path: Path,
    manifest: Manifest,
    index: Index,
    tail: Mapping[str, Tensor],
    calibration: Mapping[int, Calibration],
) -> None:
    """Everything but the features. The manifest comes last: without it, there is no cache yet."""
    write_atomic(path / INDEX, index.to_bytes())
    write_tensors(path / TAIL, tail)
    statistics = {
        f"{block}.{name}": getattr(c, name).cpu() for block, c in calibration.items() for name in ("mean", "std")
    }
    write_tensors(path / CALIBRATION, statistics)
    group = zarr.open_group(path, mode="a", zarr_format=3)
    parts = CODECS[manifest.codec].parts(manifest.tokens, manifest.teacher.width)
    for block in manifest.blocks:
        for part, (shape, dtype) in parts.items():
            group.create_array(
                array_path(block, part),
                shape=(manifest.records, *shape),
                # One record a chunk: students read records in any order. Features do not compress.
                chunks=(1, *shape),
                shards=(manifest.shard_records, *shape),
                dtype=dtype,
                compressors=None,
                overwrite=True,
            )
    (path / JOURNAL).mkdir(exist_ok=True)
    write_json(path / MANIFEST, manifest.model_dump(mode="json"))


def check_same(path: Path, manifest: Manifest) -> None:
    """Raise ValueError naming both sides if the cache at `path` is not the one that `manifest` describes."""
    difference = _first_difference(read_manifest(path).identity(), manifest.identity(), "")
    if difference:
        name, there, here = difference
        raise ValueError(
            f"{path} cannot be continued: its {name} is {_short(there)}, this run has {_short(here)}; "
            "use the first run's settings or --overwrite"
        )


class CacheWriter:
    """Writes shards of a created cache. Any number of processes may hold one, for different shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._parts = CODECS[self.manifest.codec].parts(self.manifest.tokens, self.manifest.teacher.width)
        self._arrays = {
            (block, part): _open(path / array_path(block, part))
            for block in self.manifest.blocks
            for part in self._parts
        }

    def write(self, shard: int, features: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        """Store one whole shard and journal it. features: {block: {part: (records of the shard, ...)}}."""
        start, stop = self.manifest.shard_range(shard)
        assert all(len(v) == stop - start for parts in features.values() for v in parts.values()), "not a whole shard"
        writes = [
            self._arrays[block, part][start:stop].write(np.ascontiguousarray(values))
            for block, parts in features.items()
            for part, values in parts.items()
        ]
        for write in writes:
            write.result()
        files = {}
        for block in self.manifest.blocks:
            for part, (shape, _) in self._parts.items():
                name = shard_file(block, part, shard, 1 + len(shape))
                file = self.path / name
                files[name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
        write_json(
            journal_entry(self.path, shard),
            {"cache": self.manifest.id(), "shard": shard, "records": [start, stop], "files": files},
        )


def journal_entry(path: Path, shard: int) -> Path:
    return path / JOURNAL / f"{shard:06d}.json"


def pending_shards(path: Path, manifest: Manifest) -> list[int]:
    """Shards without a journal entry that matches the manifest, or with a file missing or of the wrong size."""
    return [s for s in range(manifest.shards) if not _journalled(path, manifest, s)]


def _journalled(path: Path, manifest: Manifest, shard: int) -> bool:
    entry = journal_entry(path, shard)
    if not entry.is_file():
        return False
    value = read_json(entry, "journal")
    try:
        # Zarr reads a missing file as zeros, so its absence must be noticed here.
        return (
            value["cache"] == manifest.id()
            and value["records"] == list(manifest.shard_range(shard))
            and all(_size(path / name) == known["bytes"] for name, known in value["files"].items())
        )
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{entry} is damaged; delete it and resume") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _open(path: Path) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        # A chunk of zeros is data like any other; left out, it could not be told from a missing one.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, read=True, write=True).result()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    return digest.hexdigest()


def _first_difference(there: Any, here: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            found = _first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if there == here else (name, there, here)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
