"""Write a segment of a cache: whole Zarr shards, each by one process.

A shard is done once its journal entry is durable.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from pipeline.cache.calibration import Calibration
from pipeline.cache.format import CALIBRATION, FIDELITY, IMAGES, PARTS, TAIL, journal_file, zarr_shard_file
from pipeline.cache.index import image_bytes
from pipeline.cache.manifest import Manifest
from pipeline.cache.stored import Ragged, Stored
from pipeline.cache.zarr_shards import array_metadata, pack_zarr_shard
from pipeline.data import Images
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.storage import Store
from pipeline.storage.json_files import json_bytes, sealed
from pipeline.storage.tensors import tensor_bytes
from singer.errors import UserError

# Threads that hash and write the files of a shard.
_WRITERS = 4


def small_files(
    manifest: Manifest,
    images: Images,
    suffix: Mapping[str, Tensor] | None,
    calibration: Mapping[int, Calibration],
    quantization_errors: Mapping[int, Any],
) -> dict[str, bytes]:
    """Return {name: content} of all files of a segment that are written before its features, except the manifest.

    suffix: state of the teacher's suffix, None if an earlier segment has it; calibration, quantization_errors: {block:
    value}.
    """
    statistics = {f"{b}.{name}": t for b, c in calibration.items() for name, t in c.tensors().items()}
    files = array_metadata(manifest.arrays(), manifest.records, manifest.shard_records)
    files[IMAGES] = image_bytes(images)
    files[CALIBRATION] = tensor_bytes(statistics)
    files[FIDELITY] = json_bytes(quantization_errors)
    if suffix is not None:
        files[TAIL] = tensor_bytes(suffix)
    return files


def create_segment(store: Store, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Write all files but the features. The manifest comes last, because it makes the segment exist.

    What an attempt with other settings left, which was interrupted before its manifest, is removed.
    """
    for name in store.sizes().keys() - files.keys():
        if name == TAIL or (name.endswith("/zarr.json") and not name.startswith(f"{PARTS}/")):
            store.remove(name)
    for name, content in files.items():
        store.write(name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    store.write(CACHE_MANIFEST, manifest.model_copy(update={"files": hashes}).to_bytes())


def check_same(there: Manifest, here: Manifest, place: str) -> None:
    """Raise UserError naming both sides if the segment at `place` is not the one that `here` describes."""
    difference = first_difference(there.identity(), here.identity())
    if difference:
        name, before, now = difference
        raise UserError(
            f"{place} cannot be continued: its {name} is {before}, this run has {now}; "
            "use the first run's settings or --overwrite"
        )


def write_zarr_shard(
    store: Store,
    manifest: Manifest,
    shard: int,
    values: Stored,
    unreadable: Mapping[int, str],
) -> None:
    """Store one whole Zarr shard and journal it.

    values: {array: its records of the Zarr shard}; unreadable: {image: why it cannot be decoded}.
    """
    start, stop = manifest.zarr_shard_range(shard)
    files = {}
    # Hashing takes about as long as writing, both release the interpreter lock, and a synced write mostly waits. What
    # they write is in memory already, so more threads take no more of it.
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        tasks = []
        for name, form in manifest.arrays().items():
            stored = values[name]
            assert (len(stored.lengths) if isinstance(stored, Ragged) else len(stored)) == stop - start
            pieces, file = pack_zarr_shard(stored, manifest.shard_records), zarr_shard_file(name, form, shard)
            written, digest = pool.submit(store.write, file, *pieces), pool.submit(_sha256, pieces)
            tasks.append((file, written, digest, sum(len(piece) for piece in pieces)))
        try:
            for file, written, digest, size in tasks:
                written.result()
                files[file] = {"sha256": digest.result(), "bytes": size}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    entry: dict[str, Any] = {"cache": manifest.id(), "shard": shard, "records": [start, stop], "files": files}
    entry["unreadable"] = {str(number): reason for number, reason in sorted(unreadable.items())}
    store.write(journal_file(shard), json_bytes(sealed(entry)))


def _sha256(pieces: Sequence[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def first_difference(there: Any, here: Any, name: str = "") -> tuple[str, str, str] | None:
    """Return (name, value there, value here) of the first field in which two trees differ; None if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            found = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if there == here else (name, _short(there), _short(here))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
