"""Stage 1: run the teacher once over WebDataset shards and store the features of chosen blocks.

`singer cache-teacher --teacher vit_large_patch16_224 --shards 'train-*.tar' --out CACHE`. Works on any number of
processes; a run that was killed goes on with --resume, also with another number of processes, and ends with the
same bytes. --append adds blocks, images, views or another teacher to a cache.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from pipeline.cache.append import Addition, plan_additions
from pipeline.cache.background_writer import filling
from pipeline.cache.codecs import CODECS, Calibration, calibrate
from pipeline.cache.completion import complete_part
from pipeline.cache.encode import Encoder, calibration_on
from pipeline.cache.extract import Extractor
from pipeline.cache.format import (
    COMPLETE,
    FIDELITY,
    MANIFEST,
    SKIPPED,
    DataManifest,
    Manifest,
    PixelsManifest,
    TeacherManifest,
    read_images,
    read_manifest,
)
from pipeline.cache.quantization import fidelity
from pipeline.cache.reader import read_calibration
from pipeline.cache.rows import RowReader, Rows
from pipeline.cache.segments import Part, part_name, read_parts
from pipeline.cache.variants import joint_id
from pipeline.cache.writer import check_same, create_part, small_files
from pipeline.config import Config, ViewsConfig
from pipeline.data import ImageFile, Images, decoding_quietly, expand_shards, index_shards, listing_hash, relocate
from pipeline.data.prefetch import prefetch
from pipeline.data.tars import NO_LABEL
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.progress import meter, say
from pipeline.runtime.ranks import current, watched
from pipeline.storage import Place, Store, open_store
from pipeline.storage.outputs import Mode, check_output, claimed_output, process_log, read_json, write_provenance
from pipeline.teachers.models import load_teacher, local_folder
from singer.backbones import resolve_blocks
from singer.errors import UserError
from singer.tail import TeacherTail, tail_state

STAGE = "cache-teacher"
_MAX_SHARD_RECORDS = 4096


@dataclass(frozen=True)
class CacheResult:
    """What a run of stage 1 did. records, blocks, bytes: of the whole cache; seconds, images_per_second: of this run.

    variant: names the teacher, as it was run, in refine.teacher and distill.teacher; skipped: images and shards left
    out for their defects, listed in skipped.json.
    """

    cache: Place
    id: str
    variant: str
    records: int
    blocks: tuple[int, ...]
    codec: str
    bytes: int
    skipped: int
    seconds: float
    images_per_second: float


def cache_teacher(config: Config, shards: str | Sequence[str], out: Place, mode: Mode = "new") -> CacheResult:
    """Fill a cache at `out` from the images in `shards`. Raises UserError for whatever the user can fix."""
    check_codec(config.cache.codec)
    inputs = [*expand_shards(shards), *filter(None, [config.teacher.weights, local_folder(config.teacher.name)])]
    check_output(out, mode, STAGE, config, inputs)
    store = open_store(out)
    begun = mode in ("resume", "append") and MANIFEST in store.sizes()
    teacher = load_teacher(config.teacher)
    accelerator = make_accelerator(config.cache.precision)
    main = accelerator.is_main_process
    with watched(accelerator, STAGE) as ranks, ExitStack() as claim:
        # Before the output is claimed: what is wrong with the shards leaves none. A resumed run has the list already.
        listed = index_shards(shards, config.cache.on_error) if main and not (begun and mode == "resume") else None
        teacher.model.to(accelerator.device)
        extract = Extractor(config, teacher, accelerator)
        resolve_blocks(config.cache.blocks, extract.teacher.depth)

        start, done = time.perf_counter(), 0
        claim.enter_context(claimed_output(out, mode, STAGE, config, seed=None) if main else process_log(out))
        ranks.wait()
        if begun and mode == "resume":
            check_begun(config, store, extract.teacher)
        if begun:
            # What an earlier run has begun comes first: only complete parts are known well enough to be added to.
            done += fill_parts(store, extract, shards if mode == "resume" else None)
        if main and listed is not None:
            create_parts(config, listed, out, mode, extract)
        ranks.wait()
        done += fill_parts(store, extract)
    parts = mine(read_parts(store), extract.teacher)
    seconds = time.perf_counter() - start
    return CacheResult(
        cache=out,
        id=joint_id(parts),
        variant=extract.teacher.variant,
        records=sum({p.rows: p.records for p in parts}.values()),
        blocks=tuple(sorted({b for p in parts for b in p.manifest.blocks})),
        codec=config.cache.codec,
        bytes=sum(store.sizes().values()),
        skipped=sum({p.rows: p.completion.skipped for p in parts if p.completion is not None}.values()),
        seconds=seconds,
        images_per_second=done / seconds,
    )


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise UserError(f"cache.codec: no codec {codec!r}; known: {', '.join(CODECS)}")


def check_begun(config: Config, store: Store, teacher: TeacherManifest) -> None:
    """Raise UserError naming both sides if the cache was begun with another teacher or other settings."""
    there = read_manifest(store)
    if there.version == 2:
        raise UserError(f"{store.url} was begun by format version 2 and cannot be continued; use --overwrite")
    blocks = tuple(resolve_blocks(config.cache.blocks, teacher.depth))
    whole = Addition(blocks, read_images(store), 0, config.views.count)
    check_same(there, describe(config, whole, teacher), store.url)


def create_parts(config: Config, listed: Images, out: Place, mode: Mode, extract: Extractor) -> None:
    """Create the parts that lack: the whole cache, or what --append adds. Numbers all records."""
    store = open_store(out)
    for skipped in listed.skipped:
        say(f"skipped: {skipped}")
    parts = read_parts(store) if MANIFEST in store.sizes() else []
    known = mine(parts, extract.teacher)
    wanted = config.cache.blocks
    if wanted is None and mode == "append" and known:
        wanted = known[0].manifest.blocks
    blocks = tuple(resolve_blocks(wanted, extract.teacher.depth))
    whole = Addition(blocks, listed, 0, config.views.count)
    additions = [whole]
    if mode == "append":
        check_growth(parts, describe(config, whole, extract.teacher), out)
        additions = plan_additions(parts, known, listed, config.views.count, blocks)
        if not additions:
            say("everything is there already")
    for addition in additions:
        name = part_name(len(parts))
        child = store.child(name) if name else store
        manifest, files = build_part(config, addition, extract, parts)
        if name:
            write_provenance(child, STAGE, config, seed=None)
        create_part(child, manifest, files)
        parts.append(Part(name, child, manifest))


def build_part(
    config: Config, addition: Addition, extract: Extractor, parts: Sequence[Part]
) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and small files of a part. parts: the earlier ones; this teacher's calibration holds on."""
    manifest, known = describe(config, addition, extract.teacher), mine(parts, extract.teacher)
    earlier = [p.manifest.tail_first_block for p in known]
    tail = None
    if not earlier or manifest.blocks[0] < min(earlier):
        tail = tail_state(extract.vit.model.state_dict(), manifest.blocks[0])
        # Built here for a look: a teacher whose tail cannot be rebuilt must fail before hours of work.
        TeacherTail(extract.vit.architecture, extract.vit.model_args, manifest.blocks[0], tail)
    else:
        manifest = manifest.model_copy(update={"tail_first_block": min(earlier)})
    calibration: dict[int, Calibration] = {}
    measured: dict[int, Any] = {}
    for part in known:
        figures = read_json(part.store, FIDELITY, "part of a cache")
        calibration |= read_calibration(part)
        measured |= {b: figures[str(b)] for b in part.manifest.blocks}
    unknown = [b for b in manifest.blocks if b not in calibration]
    rows = rows_of(manifest, addition.images, parts)
    with ImageFile(addition.images) as files, decoding_quietly():
        read = RowReader(rows, files, manifest.view_form, {extract.teacher.image_size}, config.cache.on_error)
        for block, x in extract.sample(read, unknown).items():
            calibration[block] = calibrate(x, extract.teacher.prefix_tokens)
            measured[block] = fidelity(CODECS[manifest.codec], x, calibration[block])
    ours = {b: calibration[b] for b in manifest.blocks}
    return manifest, small_files(manifest, addition.images, tail, ours, {b: measured[b] for b in manifest.blocks})


def rows_of(manifest: Manifest, images: Images, earlier: Iterable[Part]) -> Rows:
    """The records of a part. earlier: parts; of one with the same images, digests and perhaps views are known."""
    for part in earlier:
        if part.lacks() is None:
            index = part.index()
            if listing_hash(index.images) == manifest.data.hash:
                return Rows.of(manifest, images, index.digest, index if part.manifest.views == manifest.views else None)
    return Rows.of(manifest, images)


def mine(parts: Iterable[Part], teacher: TeacherManifest) -> list[Part]:
    """The parts that hold features of this very teacher."""
    return [p for p in parts if p.manifest.teacher.identity() == teacher.identity()]


def check_growth(parts: Sequence[Part], here: Manifest, place: Place) -> None:
    """Raise UserError if what is to be added does not go together with what is there."""
    if not parts:
        raise UserError(f"{place} has no {MANIFEST}: nothing can be added; begin it with --resume")
    there = parts[0].manifest
    if there.version == 2:
        raise UserError(f"{place} was written by format version 2 and cannot grow; make a new cache")
    for part in parts:
        if part.lacks() is not None:
            raise UserError(f"{part.store.url} is incomplete; repeat its cache-teacher command with --append first")
    same = [p.manifest for p in parts if p.manifest.teacher.identity() == here.teacher.identity()]

    def compared(m: Manifest) -> dict[str, Any]:
        views = {f"views.{k}": v for k, v in m.views.items() if k not in ("first", "count")}
        own = (
            {"codec": m.codec, "stored_patches": m.stored_patches, "lossless": m.lossless} if m in [*same, here] else {}
        )
        return views | own

    for before in [there, *same[:1]]:
        for name, value in compared(before).items():
            now = compared(here).get(name, value)
            if now != value:
                raise UserError(f"{place} cannot grow: its {name} is {value}, this run has {now}")


def describe(config: Config, addition: Addition, teacher: TeacherManifest) -> Manifest:
    """The manifest of a part: all that its features depend on but the images, known before any is read."""
    images, records = addition.images, len(addition.images) * addition.views
    pixels = None
    if addition.drawing is None and config.views.pixels != "none":
        quality = config.views.jpeg_quality if config.views.pixels == "jpeg" else None
        pixels = PixelsManifest(
            kind=config.views.pixels, size=config.views.pixel_size or teacher.image_size, quality=quality
        )
    manifest = Manifest(
        teacher=teacher,
        data=DataManifest(
            shards=tuple(p.name for p in images.paths),
            images=len(images),
            labelled=int((images.labels != NO_LABEL).sum()),
            hash=listing_hash(images),
        ),
        views=(addition.drawing or drawing(config.views)) | {"first": addition.first_view, "count": addition.views},
        blocks=addition.blocks,
        codec=config.cache.codec,
        stored_patches=max(1, round(config.cache.token_share * teacher.patches)),
        lossless=config.cache.lossless,
        pixels=pixels,
        records=records,
        shard_records=1,
        tail_first_block=addition.blocks[0],
    )
    forms = [form for form in manifest.arrays().values() if form is not None]
    record_bytes = max(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in forms)
    fitting = max(1, config.cache.shard_mb * 2**20 // record_bytes)
    return manifest.model_copy(update={"shard_records": min(_MAX_SHARD_RECORDS, fitting, records)})


def drawing(views: ViewsConfig) -> dict[str, Any]:
    """The settings on which the drawn views depend."""
    unused = {"center": {"scale", "ratio"}, "random-resized-crop": {"crop"}}[views.kind]
    return views.model_dump(mode="json", exclude={"count", "pixels", "pixel_size", "jpeg_quality", *unused})


def fill_parts(store: Store, extract: Extractor, shards: str | Sequence[str] | None = None) -> int:
    """Fill this teacher's parts as far as they are not; the number of records that all processes do.

    shards: where the images of the first part lie now, if they may have moved.
    """
    done, accelerator, ranks = 0, extract.accelerator, current()
    parts = read_parts(store)
    for part in mine(parts, extract.teacher):
        lacks = part.lacks() if accelerator.is_main_process else None
        # One list for all processes: a quick one may have finished a shard before a slow one looks.
        ours = None if lacks is None else part.pending()
        ranks.wait()
        with ranks.together():
            (pending,) = broadcast_object_list([ours])
        if pending is None:
            continue
        if accelerator.is_main_process:
            # A shard that is computed again may differ in its last bits, where the machine is another one.
            part.store.remove(COMPLETE)
        done += fill(part, pending, extract, parts, None if part.name else shards)
        ranks.wait()
        if accelerator.is_main_process:
            left_out = complete_part(part)
            if left_out:
                say(f"{left_out} images cannot be decoded and are left out; {part.store.url}/{SKIPPED} lists them")
        ranks.wait()
    return done


def fill(
    part: Part,
    pending: Sequence[int],
    extract: Extractor,
    parts: Sequence[Part],
    shards: str | Sequence[str] | None = None,
    digests: np.ndarray | None = None,
) -> int:
    """Compute and write this process's share of the pending shards; the number of records that all processes do.

    parts: all of the cache; shards: where the images lie now, if they have moved; digests: of the images, if they were
    read before. Raises UserError if they are gone or have changed.
    """
    if not pending:
        return 0
    manifest = part.manifest
    images = relocate(read_images(part.store), shards)
    rows = rows_of(manifest, images, takewhile(lambda p: p.name != part.name, parts))
    rows = rows if digests is None else replace(rows, digests=digests)
    config, accelerator = extract.config, extract.accelerator
    encode = Encoder(manifest, rows, calibration_on(part, extract.device))
    own = pending[accelerator.process_index :: accelerator.num_processes]
    size = config.cache.batch_size
    ranges = [manifest.shard_range(s) for s in own]
    batches = (np.arange(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size))
    total = sum(stop - start for start, stop in ranges)
    if accelerator.is_main_process and 0 < len(pending) < manifest.shards:
        say(f"{manifest.shards - len(pending)} of {manifest.shards} shards are done already")

    with (
        ImageFile(images) as files,
        decoding_quietly(),
        meter("cache", total, "images", quiet=not accelerator.is_main_process) as m,
        filling(part, encode) as store,
    ):
        read = RowReader(rows, files, manifest.view_form, encode.sides, config.cache.on_error)
        for batch in prefetch(lambda records: encode.load(read, records), batches, config.cache.workers, m):
            store(extract.features(batch.pixels, manifest.blocks), batch)
            m.advance(len(batch.records))
    return sum(stop - start for start, stop in map(manifest.shard_range, pending))
