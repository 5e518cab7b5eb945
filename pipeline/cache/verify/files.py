"""Compare every file of a segment with its checksum, and the index with the manifest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.cache.completion import describe_completion
from pipeline.cache.format import COMPLETE, IMAGES, PARTS, RECORDS, SKIPPED, journal_file, zarr_shard_file
from pipeline.cache.manifest import Manifest
from pipeline.cache.segments import Segment
from pipeline.cache.verify.findings import UNKNOWN, SegmentReport
from pipeline.cache.zarr_shards import array_metadata
from pipeline.outputs.provenance import PROVENANCE
from pipeline.outputs.resuming import CACHE_MANIFEST, CONFIG
from pipeline.runtime.progress import meter
from pipeline.storage import Store
from pipeline.storage.json_files import is_sealed, json_bytes
from singer.errors import UserError

# Each reader holds a whole file in memory.
_READERS = 2


def check_segment(segment: Segment) -> SegmentReport:
    """Compare every file of a segment with its checksum, and what is known about its images with the manifest."""
    manifest, store = segment.manifest, segment.store
    report = SegmentReport(segment.name or ".", manifest.teacher.name, manifest.records, manifest.zarr_shards)
    sizes = {n: s for n, s in store.sizes().items() if not n.startswith(f"{PARTS}/")}
    report.checked_files, report.checked_bytes = len(sizes), sum(sizes.values())
    wrong = {name: file_defect(store, sizes, name, sha256) for name, sha256 in manifest.files.items()}
    wrong[CACHE_MANIFEST] = sealed_defect(store, sizes, CACHE_MANIFEST)
    wrong |= provenance_defects(store, sizes)
    known = {CACHE_MANIFEST, PROVENANCE, CONFIG, *manifest.files}
    with ThreadPoolExecutor(_READERS) as pool, meter("verify", manifest.zarr_shards, "Zarr shards") as m:
        defects = pool.map(lambda shard: zarr_shard_defects(segment, sizes, shard), range(manifest.zarr_shards))
        for shard, found in enumerate(defects):
            known |= {journal_file(shard), *zarr_shard_files(manifest, shard)}
            if found is None:
                report.missing.append(shard)
            elif found:
                report.damaged.append(shard)
                wrong |= found
            m.advance(1)
    wrong |= completion_defects(segment, sizes, whole=not (report.missing or report.damaged))
    known |= {COMPLETE, RECORDS, SKIPPED}
    wrong |= dict.fromkeys(sorted(set(sizes) - known), UNKNOWN)
    report.files = {within(segment, name): why for name, why in wrong.items() if why is not None}
    return report


def completion_defects(segment: Segment, sizes: Mapping[str, int], whole: bool) -> dict[str, str | None]:
    """Return {file: what is wrong with it} of the files that complete a segment.

    whole: whether all its Zarr shards are done and match the journal.
    """
    store = segment.store
    if not whole or file_defect(store, sizes, IMAGES, segment.manifest.files[IMAGES]):
        # These files can only be compared with each other. A segment that is still being filled has none of them.
        wrong = sealed_defect(store, sizes, COMPLETE)
        found = None if wrong else segment.completion
        named = {} if found is None else found.files
        wrong_files = {name: file_defect(store, sizes, name, sha256) for name, sha256 in named.items()}
        return wrong_files | {COMPLETE: None if wrong == "missing" else wrong}
    done, small = describe_completion(segment)
    contents = small | {COMPLETE: done.to_bytes()}
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    present = {name for name in (COMPLETE, RECORDS, SKIPPED) if name in sizes} - set(expected)
    return {n: file_defect(store, sizes, n, sha256) for n, sha256 in expected.items()} | dict.fromkeys(present, UNKNOWN)


def zarr_shard_defects(segment: Segment, sizes: Mapping[str, int], shard: int) -> dict[str, str] | None:
    """Return {file: what is wrong with it} of a Zarr shard; None if it was never finished."""
    journal = journal_file(shard)
    if journal not in sizes:
        return None
    try:
        files = segment.entry(shard)["files"]
    except (UserError, OSError):
        return {journal: "damaged"}
    expected = set(zarr_shard_files(segment.manifest, shard))
    if sealed_defect(segment.store, sizes, journal) is not None or set(files) != expected:
        return {journal: "damaged"}
    found = {n: file_defect(segment.store, sizes, n, f["sha256"], f["bytes"]) for n, f in files.items()}
    return {name: why for name, why in found.items() if why is not None}


def zarr_shard_files(manifest: Manifest, shard: int) -> list[str]:
    """Return the files of a Zarr shard, one for each array."""
    return [zarr_shard_file(name, form, shard) for name, form in manifest.arrays().items()]


def metadata(manifest: Manifest) -> dict[str, bytes]:
    """Return {name: content} of the zarr.json files of a segment."""
    return array_metadata(manifest.arrays(), manifest.records, manifest.shard_records)


def within(segment: Segment, name: str) -> str:
    """Return the place of a segment's file within the cache."""
    return f"{segment.name}/{name}" if segment.name else name


def file_defect(
    store: Store, sizes: Mapping[str, int], name: str, sha256: str | None, size: int | None = None
) -> str | None:
    """Say what is wrong with a file; return None if nothing is. sha256, size: the right values, if they are known."""
    if name not in sizes:
        return "missing"
    if size is not None and sizes[name] != size:
        return f"damaged: {sizes[name]} bytes, not {size}"
    try:
        data = store.read(name)
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    return None if sha256 in (None, hashlib.sha256(data).hexdigest()) else "damaged"


def sealed_defect(store: Store, sizes: Mapping[str, int], name: str) -> str | None:
    """Say what is wrong with a JSON file that holds its own checksum; return None if nothing is."""
    if name not in sizes:
        return "missing"
    try:
        data = store.read(name)
        value = json.loads(data)
        # The checksum covers the JSON value, but not its spelling: spaces, for example, could have changed.
        whole = isinstance(value, dict) and is_sealed(value) and json_bytes(value) == data
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    except ValueError:
        whole = False
    return None if whole else "damaged"


def provenance_defects(store: Store, sizes: Mapping[str, int]) -> dict[str, str | None]:
    """Return {file: what is wrong with it} of the files that say how a segment was made."""
    wrong = sealed_defect(store, sizes, PROVENANCE)
    known = json.loads(store.read(PROVENANCE)).get("config_sha256") if wrong is None else None
    return {PROVENANCE: wrong, CONFIG: file_defect(store, sizes, CONFIG, known)}


def unreachable(store: Store, segments: Sequence[Segment]) -> dict[str, str]:
    """Return {file: what is wrong with it} of files in the folder of the segments that belong to none of them."""
    reached = {segment.name for segment in segments}
    found = {}
    for name in sorted(store.sizes(PARTS)):
        folder = "/".join(name.split("/")[:2])
        if name == folder:
            found[name] = UNKNOWN
        elif folder not in reached:
            # Either an appending run died before it wrote the manifest, or the file was lost.
            found[f"{PARTS}/{len(segments):03d}/{CACHE_MANIFEST}"] = "missing"
    return found
