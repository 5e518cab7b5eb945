"""Every file of a part against its checksum, and the index against the manifest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.cache.format import (
    CALIBRATION,
    INDEX,
    MANIFEST,
    PARTS,
    TAIL,
    Manifest,
    journal_file,
    read_index,
    shard_file,
)
from pipeline.cache.parts import Part
from pipeline.cache.zarr_shards import array_metadata
from pipeline.outputs import CONFIG, PROVENANCE, is_sealed, json_bytes, parse_tensors
from pipeline.progress import meter
from pipeline.shards import content_hash
from pipeline.stores import Store
from pipeline.verify.findings import UNKNOWN, PartReport
from singer.errors import UserError

# Each holds a whole file in memory.
_READERS = 2


def check_part(part: Part) -> PartReport:
    """Compare every file of a part with its checksum, and the index with the manifest.

    Version 1 has no checksums of its small files: those must be there and readable.
    """
    manifest, store = part.manifest, part.store
    report = PartReport(part.name or ".", manifest.teacher.name, manifest.records, manifest.shards)
    sizes = {n: s for n, s in store.sizes().items() if not n.startswith(f"{PARTS}/")}
    report.checked_files, report.checked_bytes = len(sizes), sum(sizes.values())
    expected: dict[str, str | None] = dict(manifest.files)
    if manifest.version == 1:
        expected = dict.fromkeys([INDEX, TAIL, CALIBRATION, *metadata(manifest)])
    wrong = {name: file_defect(store, sizes, name, sha256) for name, sha256 in expected.items()}
    if manifest.version == 1:
        wrong |= {name: wrong[name] or tensors_defect(store, name) for name in (TAIL, CALIBRATION)}
    else:
        wrong[MANIFEST] = sealed_defect(store, sizes, MANIFEST)
        wrong |= provenance_defects(store, sizes)
    if wrong.get(INDEX) is None:
        wrong[INDEX] = index_defect(part)

    known = {MANIFEST, PROVENANCE, CONFIG, *expected}
    with ThreadPoolExecutor(_READERS) as pool, meter("verify", manifest.shards, "shards") as m:
        defects = pool.map(lambda shard: shard_defects(part, sizes, shard), range(manifest.shards))
        for shard, found in enumerate(defects):
            known |= {journal_file(shard), *shard_files(manifest, shard)}
            if found is None:
                report.missing.append(shard)
            elif found:
                report.damaged.append(shard)
                wrong |= found
            m.advance(1)
    wrong |= dict.fromkeys(sorted(set(sizes) - known), UNKNOWN)
    report.files = {within(part, name): why for name, why in wrong.items() if why is not None}
    return report


def shard_defects(part: Part, sizes: Mapping[str, int], shard: int) -> dict[str, str] | None:
    """{file: what is wrong with it} of a shard; None if it was never finished."""
    journal = journal_file(shard)
    if journal not in sizes:
        return None
    try:
        files = part.entry(shard)["files"]
    except (UserError, OSError):
        return {journal: "damaged"}
    sealed = part.manifest.version == 1 or sealed_defect(part.store, sizes, journal) is None
    if not sealed or set(files) != set(shard_files(part.manifest, shard)):
        return {journal: "damaged"}
    found = {n: file_defect(part.store, sizes, n, f["sha256"], f["bytes"]) for n, f in files.items()}
    return {name: why for name, why in found.items() if why is not None}


def shard_files(manifest: Manifest, shard: int) -> list[str]:
    return [shard_file(name, form, shard) for name, form in manifest.arrays().items()]


def metadata(manifest: Manifest) -> dict[str, bytes]:
    """{name: content} of the zarr.json files of a part."""
    arrays = manifest.arrays()
    compression = {name: manifest.compression(name) for name in arrays}
    return array_metadata(arrays, compression, manifest.records, manifest.shard_records)


def within(part: Part, name: str) -> str:
    """The place of a part's file in the cache."""
    return f"{part.name}/{name}" if part.name else name


def file_defect(
    store: Store, sizes: Mapping[str, int], name: str, sha256: str | None, size: int | None = None
) -> str | None:
    """What is wrong with a file; None if nothing is. sha256, size: what it should have, if known."""
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
    """What is wrong with a JSON file that holds its own checksum; None if nothing is."""
    if name not in sizes:
        return "missing"
    try:
        data = store.read(name)
        value = json.loads(data)
        # The checksum is that of the value: blanks, say, could have changed beside it.
        whole = isinstance(value, dict) and is_sealed(value) and json_bytes(value) == data
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    except ValueError:
        whole = False
    return None if whole else "damaged"


def tensors_defect(store: Store, name: str) -> str | None:
    """What is wrong with a safetensors file without a checksum; None if nothing can be seen."""
    try:
        parse_tensors(store.read(name), name)
    except UserError:
        return "damaged"
    return None


def provenance_defects(store: Store, sizes: Mapping[str, int]) -> dict[str, str | None]:
    """What is wrong with the files that say how a part was made."""
    wrong = sealed_defect(store, sizes, PROVENANCE)
    known = json.loads(store.read(PROVENANCE)).get("config_sha256") if wrong is None else None
    return {PROVENANCE: wrong, CONFIG: file_defect(store, sizes, CONFIG, known)}


def index_defect(part: Part) -> str | None:
    """Why the index cannot be that of the manifest; None if it can."""
    try:
        index = read_index(part.store)
        manifest, images = part.manifest, index.images
        same = images.place_hash() if index.digest is None else content_hash(images, index.digest)
        if same != manifest.data.hash or len(images) != manifest.data.images:
            return "damaged: its images are not those of the manifest"
        records = np.unique(np.stack([index.image, index.view]), axis=1).shape[1]
        if len(index) != manifest.records or records != len(index):
            return f"damaged: it numbers {records} records, not {manifest.records}"
        return None if len(set(images.keys)) == len(images) else "damaged: keys occur twice"
    except ValueError:  # also what damaged columns make NumPy stumble over
        return "damaged"


def unreachable(store: Store, parts: Sequence[Part]) -> dict[str, str]:
    """{file: what is wrong with it} of what lies among the parts but belongs to none."""
    reached = {part.name for part in parts}
    found = {}
    for name in sorted(store.sizes(PARTS)):
        folder = "/".join(name.split("/")[:2])
        if name == folder:
            found[name] = UNKNOWN
        elif folder not in reached:
            # An appending run that died before this, or a lost file.
            found[f"{PARTS}/{len(parts):03d}/{MANIFEST}"] = "missing"
    return found
