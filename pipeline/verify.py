"""Is a cache whole and true? `singer cache verify CACHE [--weights FILE] [--repair]`.

Every file is compared with its checksum and the index with the manifest; with the teacher at hand, its features are
computed anew for a random sample and compared with the stored ones. --repair computes again what is damaged.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.cache.codecs import CODECS
from pipeline.cache.encoder import calibration_on
from pipeline.cache.fidelity import error_sums, errors, token_cosines
from pipeline.cache.format import (
    CALIBRATION,
    FEATURES,
    FIDELITY,
    INDEX,
    MANIFEST,
    PARTS,
    POSITIONS,
    SKIPPED,
    TAIL,
    Index,
    Manifest,
    journal_file,
    read_index,
    shard_file,
)
from pipeline.cache.parts import Part, read_parts
from pipeline.cache.pixels import views_of
from pipeline.cache.reader import PartReader
from pipeline.cache.writer import first_difference
from pipeline.cache.zarr_shards import array_metadata
from pipeline.cache_teacher import fill, mine
from pipeline.config import CacheConfig, Config
from pipeline.devices import make_accelerator
from pipeline.extract import Extractor, check_finite
from pipeline.models import load_teacher
from pipeline.outputs import CONFIG, PROVENANCE, is_sealed, json_bytes, parse_tensors, tensor_bytes
from pipeline.progress import meter, say
from pipeline.shards import ImageFile, content_hash, image_digest, relocate
from pipeline.stores import Place, Store, open_store
from singer.matching import take_patches
from singer.tail import tail_state

# Each holds a whole file in memory.
_READERS = 2
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class LiveCheck:
    """Stored against live features of a sample of records.

    gate: mean cosine of a record's tokens below which it fails; below: how many do; worst: the lowest, with its key and
    block; blocks: {block: relative error and cosine of prefix, clean and artifact tokens}.
    """

    records: int
    gate: float
    below: int
    worst: float
    worst_key: str
    worst_block: int
    blocks: dict[int, Any]


@dataclass
class PartReport:
    """What was found in a part. part: its folder, "." for the first.

    missing: shards that were never finished; damaged: shards with a wrong or lost file; repaired: of both, the shards
    that were computed again; files: {place within the cache: what is wrong with it}.
    """

    part: str
    teacher: str
    records: int
    shards: int
    checked_files: int = 0
    checked_bytes: int = 0
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    live: LiveCheck | None = None

    @property
    def whole(self) -> bool:
        return not (self.missing or self.damaged or self.files or (self.live and self.live.below))


@dataclass(frozen=True)
class VerifyResult:
    """whole: everything is there, as it was written and, if the teacher was at hand, as it computes it."""

    cache: Place
    whole: bool
    parts: list[PartReport]

    def check(self) -> None:
        """Raise ValueError saying what to do if the cache is not whole."""
        problems: dict[str, list[str]] = {}
        for problem, remedy in _problems(self):
            problems.setdefault(remedy, []).append(problem)
        if problems:
            raise ValueError(". ".join(f"{_some(found, 3)}; {remedy}" for remedy, found in problems.items()))


def verify(
    config: Config,
    place: Place,
    *,
    live: bool = False,
    shards: str | Sequence[str] | None = None,
    sample: int = 64,
    repair: bool = False,
) -> VerifyResult:
    """Check the cache at `place`, complete or not; with `live` or `repair`, load config.teacher for a sample too.

    shards: where the images lie now, if they have moved; sample: records of each part. Nothing is written, nor a lock
    taken, except for `repair`. Raises ValueError if a manifest cannot be read, the teacher is none of the cache's, or
    what `repair` needs is gone.
    """
    store = open_store(place)
    parts = read_parts(store)
    if repair and parts[0].manifest.version == 1:
        raise ValueError(f"{place} was written by format version 1 and cannot be repaired; make a new cache")
    extract = load_extractor(config, parts) if live or repair else None
    with store.lock() if repair else nullcontext():
        reports = {part.name: check_part(part) for part in parts}
        reports[""].files |= unreachable(store, parts)
        if extract is not None:
            for part in mine(parts, extract.teacher):
                if repair:
                    repair_part(part, reports[part.name], extract, shards)
                reports[part.name].live = check_live(part, reports[part.name], extract, shards, sample)
    return VerifyResult(place, all(r.whole for r in reports.values()), list(reports.values()))


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
    wrong |= dict.fromkeys(sorted(set(sizes) - known), _UNKNOWN)
    report.files = {within(part, name): why for name, why in wrong.items() if why is not None}
    return report


def shard_defects(part: Part, sizes: Mapping[str, int], shard: int) -> dict[str, str] | None:
    """{file: what is wrong with it} of a shard; None if it was never finished."""
    journal = journal_file(shard)
    if journal not in sizes:
        return None
    try:
        files = part.entry(shard)["files"]
    except (ValueError, OSError):
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
    except ValueError:
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
    except ValueError:
        return "damaged"


def unreachable(store: Store, parts: Sequence[Part]) -> dict[str, str]:
    """{file: what is wrong with it} of what lies among the parts but belongs to none."""
    reached = {part.name for part in parts}
    found = {}
    for name in sorted(store.sizes(PARTS)):
        folder = "/".join(name.split("/")[:2])
        if name == folder:
            found[name] = _UNKNOWN
        elif folder not in reached:
            # An appending run that died before this, or a lost file.
            found[f"{PARTS}/{len(parts):03d}/{MANIFEST}"] = "missing"
    return found


def load_extractor(config: Config, parts: Sequence[Part]) -> Extractor:
    """The teacher of config.teacher, run as for the cache; its first teacher if config names none.

    Raises ValueError naming both sides if the cache holds no features of it.
    """
    teachers = [p.manifest.teacher for p in parts]
    given = config.teacher
    named = [t for t in teachers if "name" in given.model_fields_set and t.name == given.name]
    sized = [t for t in named or teachers if t.image_size == given.image_size]
    known = (sized or named or teachers)[0]
    name = given.name if "name" in given.model_fields_set else known.name
    config = config.model_copy(
        update={
            "teacher": given.model_copy(update={"name": name, "image_size": known.image_size}),
            "cache": config.cache.model_copy(update={"precision": known.precision}),
        }
    )
    vit = load_teacher(config.teacher)
    accelerator = make_accelerator(config.cache.precision)
    vit.model.to(accelerator.device)
    extract = Extractor(config, vit, accelerator)
    if not mine(parts, extract.teacher):
        difference = first_difference(known.identity(), extract.teacher.identity())
        assert difference is not None
        key, there, here = difference
        source = f" with {given.weights}" if given.weights else ""
        raise ValueError(f"the cache's teacher.{key} is {there} ({known.name}), here it is {here} ({name}{source})")
    return extract


def repair_part(part: Part, report: PartReport, extract: Extractor, shards: str | Sequence[str] | None) -> None:
    """Write again what is damaged or missing of a part and can be computed; the report is brought up to date."""
    manifest, store = part.manifest, part.store
    again = metadata(manifest)
    if within(part, TAIL) in report.files:
        again[TAIL] = tensor_bytes(tail_state(extract.vit.model.state_dict(), manifest.tail_first_block))
    for name, content in again.items():
        if within(part, name) not in report.files:
            continue
        if hashlib.sha256(content).hexdigest() == manifest.files.get(name):
            store.write(name, content)
            del report.files[within(part, name)]
        else:
            say(f"{store.url}/{name} was written by other versions of libraries; restore it from a copy")

    wanted = sorted(report.missing + report.damaged)
    if not wanted or not _computable(part, report):
        return
    check_images(read_index(store), np.concatenate([np.arange(*manifest.shard_range(s)) for s in wanted]), shards)
    own = copy(extract)
    own.config = with_batch_size(extract.config, store)
    for shard in wanted:
        # First: a run that dies from here on leaves the shard missing, not half new.
        store.remove(journal_file(shard))
    fill(part, wanted, own, shards)

    report.missing, report.damaged, sizes = [], [], store.sizes()
    for shard in wanted:
        for name in (journal_file(shard), *shard_files(manifest, shard)):
            report.files.pop(within(part, name), None)
        found = shard_defects(part, sizes, shard)
        if found == {}:
            report.repaired.append(shard)
        else:  # the disk itself fails
            report.damaged.append(shard)
            report.files |= {within(part, name): why for name, why in (found or {}).items()}


def _computable(part: Part, report: PartReport) -> bool:
    return not {within(part, INDEX), within(part, CALIBRATION)} & set(report.files)


def with_batch_size(config: Config, store: Store) -> Config:
    """The configuration with the batches in which a part was computed: others change the last bits of features."""
    try:
        size = yaml.safe_load(store.read(CONFIG))["cache"]["batch_size"]
        known = CacheConfig.model_validate({**config.cache.model_dump(), "batch_size": size})
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return config
    return config.model_copy(update={"cache": known})


def check_images(index: Index, records: np.ndarray, shards: str | Sequence[str] | None) -> None:
    """Raise ValueError naming the first image of some records that is not the one that was cached."""
    if index.digest is None:
        return
    with ImageFile(relocate(index.images, shards)) as files:
        for image in np.unique(index.image[records]).tolist():
            data, where = files.encoded(image)
            if image_digest(data) != int(index.digest[image]):
                raise ValueError(f"{where} is not the one that was cached; give its shards with --shards")


def check_live(
    part: Part, report: PartReport, extract: Extractor, shards: str | Sequence[str] | None, sample: int
) -> LiveCheck | None:
    """Compute the features of a random sample of a part's whole shards anew and compare them with the stored ones.

    None if there is nothing to compare.
    """
    manifest = part.manifest
    whole = sorted(set(range(manifest.shards)) - {*report.missing, *report.damaged})
    if not whole or not _computable(part, report):
        return None
    index, device = read_index(part.store), extract.device
    pool = np.concatenate([np.arange(*manifest.shard_range(s)) for s in whole])
    rng = np.random.default_rng(int(manifest.id()[:8], 16))
    records = np.sort(rng.choice(pool, min(sample, len(pool)), replace=False))
    check_images(index, records, shards)
    reader = PartReader(part, {s: part.entry(s) for s in np.unique(records // manifest.shard_records).tolist()})
    codec, calibration, prefix = CODECS[manifest.codec], calibration_on(part, device), manifest.teacher.prefix_tokens
    sums = dict.fromkeys(manifest.blocks, torch.zeros(3, 4, dtype=torch.float64))
    cosines = []
    with (
        ImageFile(relocate(index.images, shards)) as files,
        meter("live check", len(records), "records") as m,
    ):
        for batch in np.array_split(records, -(-len(records) // extract.config.cache.batch_size)):
            views = views_of(files, index, batch, manifest.teacher.image_size)
            features = extract.features(torch.from_numpy(views), manifest.blocks)
            check_finite(features, batch, index)
            positions = reader.read(POSITIONS, batch) if manifest.sampled else None
            of_batch = []
            for block, live in features.items():
                parts = {n: reader.read(f"{FEATURES}/{block}/{n}", batch).to(device) for n in manifest.layout(block)}
                stored = codec.decode(parts, calibration[block])
                if isinstance(positions, torch.Tensor):
                    live = take_patches(live, prefix, positions)
                sums[block] = sums[block] + error_sums(stored, live, prefix, calibration[block].threshold)
                of_batch.append(token_cosines(stored, live).mean(-1).cpu())
            cosines.append(torch.stack(of_batch))
            m.advance(len(batch))
    by_record = torch.cat(cosines, 1)  # (blocks, records)
    block, record = divmod(int(by_record.argmin()), len(records))
    return LiveCheck(
        records=len(records),
        gate=codec.min_cosine,
        # A cosine that is no number fails too.
        below=int((~(by_record >= codec.min_cosine)).any(0).sum()),
        worst=float(by_record[block, record]),
        worst_key=index.key(int(records[record])),
        worst_block=manifest.blocks[block],
        blocks={b: errors(s) for b, s in sums.items()},
    )


def _problems(result: VerifyResult) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do about it)."""
    place = result.cache
    repair = f"repair with singer cache verify {place} --repair --weights FILE"
    for r in result.parts:
        here = str(place) if r.part == "." else f"{place}/{r.part}"
        if r.live and r.live.below:
            problem = (
                f"{r.live.below} of {r.live.records} records of {here} are not what {r.teacher} computes now: image "
                f"{r.live.worst_key!r} has cosine {r.live.worst:.4f} at block {r.live.worst_block}, not {r.live.gate}"
            )
            yield problem, "make the cache anew"
        bad = sorted(r.missing + r.damaged)
        if bad:
            yield f"{len(bad)} of {r.shards} shards of {here} are damaged or missing: {_some(bad)}", repair
        for name, why in r.files.items():
            file = name.rpartition("/")[2]
            if why == _UNKNOWN:
                yield f"{place}/{name} belongs to no part of the cache", "remove it"
            elif file == MANIFEST and why == "missing":
                yield f"{place}/{name} is missing", "repeat the cache-teacher command with --append"
            elif file in (MANIFEST, INDEX, CALIBRATION, FIDELITY, SKIPPED, PROVENANCE, CONFIG):
                remedy = "this cannot be computed again: restore it from a copy or make the cache anew"
                yield f"{place}/{name} is {why}", remedy
            elif file in (TAIL, "zarr.json"):
                yield f"{place}/{name} is {why}", repair


def _some(items: Sequence[object], most: int = 10) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
