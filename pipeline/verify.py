"""Is a cache whole and true? `singer cache verify CACHE [--weights FILE] [--repair]`.

Every file is checked against its checksum and every record against the index; with the teacher at hand, its features
are computed anew for a random sample and compared with the stored ones. --repair computes damaged shards again.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.cache.codecs import CODECS
from pipeline.cache.fidelity import compare
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
    journal_file,
    read_index,
    shard_file,
)
from pipeline.cache.parts import Part, read_parts
from pipeline.cache.reader import PartReader, read_calibration
from pipeline.cache.writer import first_difference
from pipeline.cache.zarr_shards import array_metadata
from pipeline.cache_teacher import Extractor, check_finite, fill, mine, views_of
from pipeline.config import Config
from pipeline.devices import make_accelerator
from pipeline.models import load_teacher
from pipeline.outputs import CONFIG, PROVENANCE, is_sealed, read_json, tensor_bytes
from pipeline.progress import meter, say
from pipeline.shards import ImageFile, content_hash, relocate
from pipeline.stores import LOCK, Place, open_store
from singer.matching import take_patches
from singer.tail import tail_state


@dataclass(frozen=True)
class LiveCheck:
    """Stored against live features of a sample. blocks: {block: errors, clean and artifact tokens apart}.

    worst: lowest mean cosine of a record, and its key; gate: the cosine below which the check fails.
    """

    records: int
    gate: float
    worst: float
    worst_key: str
    blocks: dict[int, Any]


@dataclass(frozen=True)
class VerifyResult:
    """shards: {part: damaged or missing shards}; files: what else is damaged, missing or unknown, and why."""

    cache: Place
    checked_files: int
    checked_bytes: int
    records: int
    shards: dict[str, list[int]]
    files: dict[str, str]
    live: dict[str, LiveCheck]
    repaired: dict[str, list[int]]

    @property
    def whole(self) -> bool:
        truth = all(check.worst >= check.gate for check in self.live.values())
        return truth and not self.files and not any(self.shards.values())


@dataclass
class Findings:
    """What is wrong with a part. shards: by number, why; files: by name, why."""

    shards: dict[int, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    bytes: int = 0


def verify(
    config: Config,
    place: Place,
    *,
    live: bool = False,
    shards: str | Sequence[str] | None = None,
    sample: int = 64,
    repair: bool = False,
) -> VerifyResult:
    """Check the cache at `place`; with `live` or `repair`, load config.teacher too.

    shards: where the images lie now, if they have moved. Raises ValueError if there is no readable cache, or if the
    teacher is none of the cache's.
    """
    store = open_store(place)
    parts = read_parts(store)
    found = {part.name: check_part(part) for part in parts}
    _report_findings(parts, found)
    repaired: dict[str, list[int]] = {}
    checks: dict[str, LiveCheck] = {}
    if live or repair:
        extract = load_extractor(config, parts)
        if repair:
            with store.lock():
                for part in mine(parts, extract.teacher):
                    repaired[part.name] = repair_part(part, found[part.name], extract)
            found = {part.name: check_part(part) for part in parts}
        for part in mine(parts, extract.teacher):
            if live and not found[part.name].shards:
                checks[part.name or "root"] = check_live(part, extract, shards, sample)
    return VerifyResult(
        cache=place,
        checked_files=sum(f.checked for f in found.values()),
        checked_bytes=sum(f.bytes for f in found.values()),
        records=sum(p.manifest.records for p in parts),
        shards={name or "root": sorted(f.shards) for name, f in found.items() if f.shards},
        files={f"{part.store.url}/{n}": why for part in parts for n, why in found[part.name].files.items()},
        live=checks,
        repaired={name or "root": numbers for name, numbers in repaired.items() if numbers},
    )


def check_part(part: Part) -> Findings:
    """Compare every file of a part with its checksum, and the index with the manifest."""
    found, manifest = Findings(), part.manifest
    sizes = {n: s for n, s in part.store.sizes().items() if not n.startswith(f"{PARTS}/")}
    known = {MANIFEST, PROVENANCE, CONFIG, LOCK, *manifest.files}
    if manifest.version == 1:
        known |= {INDEX, TAIL, CALIBRATION, *array_files(part)}

    def check(name: str, sha256: str) -> str | None:
        if name not in sizes:
            return "missing"
        found.bytes += sizes[name]
        return None if hashlib.sha256(part.store.read(name)).hexdigest() == sha256 else "damaged"

    for name, sha256 in manifest.files.items():
        why = check(name, sha256)
        if why:
            found.files[name] = why
    for name, why in _provenance_defects(part, set(sizes)):
        found.files[name] = why

    def check_shard(shard: int) -> str | None:
        if journal_file(shard) not in sizes:
            return "missing"
        try:
            entry = part.entry(shard)
        except ValueError:
            return f"{journal_file(shard)} is damaged"
        for name, file in entry["files"].items():
            why = check(name, file["sha256"])
            if why:
                return f"{name} is {why}"
        return None

    with ThreadPoolExecutor(2) as pool, meter("verify", manifest.shards, "shards") as m:
        for shard, why in enumerate(pool.map(check_shard, range(manifest.shards))):
            known |= {journal_file(shard), *(shard_file(n, form, shard) for n, form in manifest.arrays().items())}
            if why:
                found.shards[shard] = why
            m.advance(1)
    for name in sorted(set(sizes) - known):
        found.files[name] = "unknown"
    if INDEX not in found.files:
        why = index_defect(part)
        if why:
            found.files[INDEX] = why
    found.checked = len(sizes)
    return found


def array_files(part: Part) -> list[str]:
    """The zarr.json files of a part."""
    m = part.manifest
    compression = {name: m.compression(name) for name in m.arrays()}
    return list(array_metadata(m.arrays(), compression, m.records, m.shard_records))


def index_defect(part: Part) -> str | None:
    """Why the index cannot be that of the manifest; None if it can."""
    try:
        index = read_index(part.store)
    except ValueError as error:
        return str(error)
    manifest, images = part.manifest, index.images
    same = images.place_hash() if index.digest is None else content_hash(images, index.digest)
    pairs = set(zip(index.image.tolist(), index.view.tolist(), strict=True))
    if same != manifest.data.hash or len(images) != manifest.data.images:
        return "its images are not those of the manifest"
    if len(index) != manifest.records or len(pairs) != len(index):
        return f"it numbers {len(pairs)} records, the manifest {manifest.records}"
    if len(set(images.keys)) != len(images):
        return "keys occur twice"
    return None


def check_live(part: Part, extract: Extractor, shards: str | Sequence[str] | None, sample: int) -> LiveCheck:
    """Compute the features of a random sample of a part anew and compare them with the stored ones."""
    manifest, index = part.manifest, read_index(part.store)
    codec, calibration = CODECS[manifest.codec], read_calibration(part)
    reader = PartReader(part, part.entries())
    rng = np.random.default_rng(int(manifest.id()[:8], 16))
    records = np.sort(rng.choice(len(index), min(sample, len(index)), replace=False))
    prefix = manifest.teacher.prefix_tokens
    stored: dict[int, list[torch.Tensor]] = {b: [] for b in manifest.blocks}
    exact: dict[int, list[torch.Tensor]] = {b: [] for b in manifest.blocks}
    worst, worst_key = 1.0, ""
    images = relocate(index.images, shards)
    with ImageFile(images) as files, meter("live check", len(records), "records") as m:
        for batch in np.array_split(records, -(-len(records) // 16)):
            pixels = torch.from_numpy(views_of(files, index, batch, manifest.teacher.image_size))
            features = {b: x.cpu() for b, x in extract.features(pixels, manifest.blocks).items()}
            check_finite(features, batch, index)
            positions = reader.read(POSITIONS, batch) if manifest.sampled else None
            for block, live in features.items():
                parts = {name: reader.read(f"{FEATURES}/{block}/{name}", batch) for name in manifest.layout(block)}
                x = codec.decode(parts, calibration[block])
                if isinstance(positions, torch.Tensor):
                    live = take_patches(live, prefix, positions)
                cosine = torch.nn.functional.cosine_similarity(x, live, dim=-1).mean(-1)
                if float(cosine.min()) < worst:
                    worst, worst_key = float(cosine.min()), index.key(int(batch[int(cosine.argmin())]))
                stored[block].append(x)
                exact[block].append(live)
            m.advance(len(batch))
    blocks = {
        b: compare(torch.cat(stored[b]), torch.cat(exact[b]), prefix, calibration[b].threshold) for b in manifest.blocks
    }
    return LiveCheck(len(records), codec.min_cosine, worst, worst_key, blocks)


def load_extractor(config: Config, parts: Sequence[Part]) -> Extractor:
    """The teacher of config.teacher, as the cache ran it. Raises ValueError naming both sides if it is none of its."""
    first = parts[0].manifest.teacher
    candidates = [p.manifest.teacher for p in parts if p.manifest.teacher.name == config.teacher.name] or [first]
    teacher = candidates[0]
    given = config.teacher.model_copy(update={"image_size": teacher.image_size})
    if config.teacher.name == type(config.teacher)().name:
        given = given.model_copy(update={"name": teacher.name})
    cache = config.cache.model_copy(update={"precision": teacher.precision})
    config = config.model_copy(update={"teacher": given, "cache": cache})
    accelerator = make_accelerator(config.cache.precision)
    vit = load_teacher(given)
    vit.model.to(accelerator.device)
    extract = Extractor(config, vit, accelerator)
    if not mine(parts, extract.teacher):
        difference = first_difference(teacher.identity(), extract.teacher.identity())
        assert difference is not None
        name, there, here = difference
        raise ValueError(f"the cache's teacher.{name} is {there}, that of {given.name} is {here}")
    return extract


def repair_part(part: Part, found: Findings, extract: Extractor) -> list[int]:
    """Write damaged shards and array metadata of a part anew; the numbers of the shards."""
    m, store = part.manifest, part.store
    compression = {name: m.compression(name) for name in m.arrays()}
    again = array_metadata(m.arrays(), compression, m.records, m.shard_records)
    if TAIL in found.files:
        again[TAIL] = tensor_bytes(tail_state(extract.vit.model.state_dict(), m.tail_first_block))
    for name, content in again.items():
        if name in found.files and hashlib.sha256(content).hexdigest() == m.files[name]:
            store.write(name, content)
            del found.files[name]
    needed = [n for n in (INDEX, CALIBRATION, FIDELITY, SKIPPED) if n in found.files]
    if needed:
        say(f"{store.url}/{needed[0]} is {found.files[needed[0]]} and cannot be computed again; restore it")
        return []
    for shard in found.shards:
        store.remove(journal_file(shard))
    shards = sorted(found.shards)
    fill(part, shards, extract)
    return shards


def _provenance_defects(part: Part, present: set[str]) -> Iterator[tuple[str, str]]:
    if part.manifest.version == 1:
        return
    for name in (PROVENANCE, CONFIG):
        if name not in present:
            yield name, "missing"
            return
    try:
        value = read_json(part.store, PROVENANCE, "part of a cache")
    except ValueError:
        value = {}
    if not is_sealed(value):
        yield PROVENANCE, "damaged"
    elif hashlib.sha256(part.store.read(CONFIG)).hexdigest() != value.get("config_sha256"):
        yield CONFIG, "damaged"


def _report_findings(parts: Sequence[Part], found: Mapping[str, Findings]) -> None:
    for part in parts:
        for shard, why in found[part.name].shards.items():
            say(f"{part.store.url}: shard {shard}: {why}")
        for name, why in found[part.name].files.items():
            say(f"{part.store.url}/{name}: {why}")
