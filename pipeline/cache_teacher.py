"""Stage 1: run the teacher once over WebDataset shards and store the features of chosen blocks.

`singer cache-teacher --teacher vit_large_patch16_224 --shards 'train-*.tar' --out CACHE`. Works on any number of
processes; a run that was killed goes on with --resume, also with another number of processes, and ends with the
same bytes. --append adds blocks, images, views or another teacher to a cache.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from pipeline.cache.codecs import CODECS, Calibration, calibrate
from pipeline.cache.encoder import Encoder, calibration_on
from pipeline.cache.fidelity import fidelity
from pipeline.cache.filling import filling
from pipeline.cache.format import (
    FIDELITY,
    MANIFEST,
    DataManifest,
    Index,
    Manifest,
    PixelsManifest,
    TeacherManifest,
    read_index,
)
from pipeline.cache.growth import Addition, Rows, plan_additions
from pipeline.cache.parts import Part, part_name, read_parts
from pipeline.cache.reader import read_calibration
from pipeline.cache.variants import joint_id
from pipeline.cache.writer import check_same, create_part, small_files
from pipeline.config import Config, ViewsConfig
from pipeline.devices import make_accelerator
from pipeline.extract import Extractor
from pipeline.models import load_teacher, local_folder
from pipeline.outputs import Mode, check_output, claimed_output, read_json, write_provenance
from pipeline.prefetch import prefetch
from pipeline.progress import meter, say
from pipeline.shards import ImageFile, Survey, content_hash, index_shards, relocate, survey
from pipeline.stores import Place, open_store
from pipeline.tars import NO_LABEL
from pipeline.views import draw_view
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
    """Fill a cache at `out` from the images in `shards`. Raises UserError for whatever the user can mend."""
    check_codec(config.cache.codec)
    images = index_shards(shards, config.cache.on_error)
    inputs = [*images.paths, *filter(None, [config.teacher.weights, local_folder(config.teacher.name)])]
    check_output(out, mode, STAGE, config, inputs)
    teacher = load_teacher(config.teacher)
    accelerator = make_accelerator(config.cache.precision)
    teacher.model.to(accelerator.device)
    extract = Extractor(config, teacher, accelerator)
    resolve_blocks(config.cache.blocks, extract.teacher.depth)
    found = survey(images, config.cache.workers, config.cache.on_error) if accelerator.is_main_process else None

    start = time.perf_counter()
    claim = claimed_output(out, mode, STAGE, config, seed=None) if accelerator.is_main_process else nullcontext()
    with claim:
        if found is not None:
            create_parts(config, found, out, mode, extract)
        accelerator.wait_for_everyone()
        done = 0
        for part in mine(read_parts(open_store(out)), extract.teacher):
            # One list for all processes: a quick one may have finished a shard before a slow one looks.
            (pending,) = broadcast_object_list([part.pending()])
            # Shards that have moved are given again; what --append is given may be others.
            done += fill(part, pending, extract, shards if mode == "resume" and not part.name else None)
            accelerator.wait_for_everyone()
    parts = mine(read_parts(open_store(out)), extract.teacher)
    seconds = time.perf_counter() - start
    return CacheResult(
        cache=out,
        id=joint_id(parts),
        variant=extract.teacher.variant,
        records=sum({p.manifest.rows(): p.manifest.records for p in parts}.values()),
        blocks=tuple(sorted({b for p in parts for b in p.manifest.blocks})),
        codec=config.cache.codec,
        bytes=sum(open_store(out).sizes().values()),
        skipped=len(found.images.skipped) if found is not None else 0,
        seconds=seconds,
        images_per_second=done / seconds,
    )


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise UserError(f"cache.codec: no codec {codec!r}; known: {', '.join(CODECS)}")


def create_parts(config: Config, found: Survey, out: Place, mode: Mode, extract: Extractor) -> None:
    """Create the parts that lack: the whole cache, what --append adds, or none. Numbers all records."""
    store = open_store(out)
    for skipped in found.images.skipped:
        say(f"skipped: {skipped.shard} {skipped.key}: {skipped.reason}")
    parts = read_parts(store) if MANIFEST in store.sizes() else []
    known = mine(parts, extract.teacher)
    wanted = config.cache.blocks
    if wanted is None and mode == "append" and known:
        wanted = known[0].manifest.blocks
    blocks = tuple(resolve_blocks(wanted, extract.teacher.depth))
    whole = Addition(blocks, Rows(found, 0, config.views.count))
    if mode == "append":
        check_growth(parts, describe(config, whole, extract.teacher), out)
        additions = plan_additions(parts, known, found, config.views.count, blocks)
        if not additions:
            say("everything is there already")
    elif parts:
        check_same(parts[0].manifest, describe(config, whole, extract.teacher), str(out))
        additions = []
    else:
        additions = [whole]
    for addition in additions:
        name = part_name(len(parts))
        child = store.child(name) if name else store
        manifest, files = build_part(config, addition, extract, mine(parts, extract.teacher), found)
        if name:
            write_provenance(child, STAGE, config, seed=None)
        create_part(child, manifest, files)
        parts.append(Part(name, child, manifest))


def build_part(
    config: Config, addition: Addition, extract: Extractor, known: Sequence[Part], found: Survey
) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and small files of a part. known: the teacher's earlier parts, whose calibration holds on."""
    manifest = describe(config, addition, extract.teacher)
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
    images = addition.rows.images.images if addition.rows else addition.index.images  # type: ignore[union-attr]
    with ImageFile(images) as files:
        index = addition.index or draw_index(config.views, addition.rows)  # type: ignore[arg-type]
        unknown = [b for b in manifest.blocks if b not in calibration]
        for block, x in extract.sample(files, index, unknown).items():
            calibration[block] = calibrate(x, extract.teacher.prefix_tokens)
            measured[block] = fidelity(CODECS[manifest.codec], x, calibration[block])
    ours = {b: calibration[b] for b in manifest.blocks}
    return manifest, small_files(
        manifest, index, tail, ours, {b: measured[b] for b in manifest.blocks}, found.images.skipped
    )


def mine(parts: Iterable[Part], teacher: TeacherManifest) -> list[Part]:
    """The parts that hold features of this very teacher."""
    return [p for p in parts if p.manifest.teacher.identity() == teacher.identity()]


def check_growth(parts: Sequence[Part], here: Manifest, place: Place) -> None:
    """Raise UserError if what is to be added does not go together with what is there."""
    there = parts[0].manifest
    if there.version == 1:
        raise UserError(f"{place} was written by format version 1 and cannot grow; make a new cache")
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
    """The manifest of a part: all that its features depend on, known before any is computed."""
    rows, views = addition.rows, addition.views
    if rows is not None:
        images, digest = rows.images.images, rows.images.digest
        views = drawing(config.views) | {"first": rows.first_view, "count": rows.views}
        records = len(images) * rows.views
    else:
        assert addition.index is not None and addition.index.digest is not None and views is not None
        images, digest, records = addition.index.images, addition.index.digest, len(addition.index)
    pixels = None
    if rows is not None and config.views.pixels != "none":
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
            hash=content_hash(images, digest),
        ),
        views=views,
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


def draw_index(views: ViewsConfig, rows: Rows) -> Index:
    """Number the records and fix every one's view. Record = image · views + view."""
    images, count = rows.images.images, len(rows.images.images)
    image = np.repeat(np.arange(count, dtype=np.int32), rows.views)
    view = np.tile(np.arange(rows.first_view, rows.first_view + rows.views, dtype=np.int32), count)
    sizes = list(zip(rows.images.width.tolist(), rows.images.height.tolist(), strict=True))
    drawn = [draw_view(views, images.keys[i], v, sizes[i]) for i, v in zip(image.tolist(), view.tolist(), strict=True)]
    box = np.array([d.box for d in drawn], dtype=np.float32)
    flip = np.array([d.flip for d in drawn], dtype=np.bool_)
    color = np.array([d.color for d in drawn], dtype=np.float32) if any(views.color) else None
    return Index(images, rows.images.digest, image, view, box, flip, color)


def fill(part: Part, pending: Sequence[int], extract: Extractor, shards: str | Sequence[str] | None = None) -> int:
    """Compute and write this process's share of the pending shards; the number of records that all processes do.

    shards: where the images lie now, if they have moved. Raises UserError if they are gone or have changed.
    """
    if not pending:
        return 0
    manifest, index = part.manifest, read_index(part.store)
    config, accelerator = extract.config, extract.accelerator
    encode = Encoder(manifest, index, calibration_on(part, extract.device))
    own = pending[accelerator.process_index :: accelerator.num_processes]
    size = config.cache.batch_size
    ranges = [manifest.shard_range(s) for s in own]
    batches = [np.arange(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size)]
    total = sum(stop - start for start, stop in ranges)
    if accelerator.is_main_process and 0 < len(pending) < manifest.shards:
        say(f"{manifest.shards - len(pending)} of {manifest.shards} shards are done already")

    with (
        ImageFile(relocate(index.images, shards)) as files,
        meter("cache", total, "images", quiet=not accelerator.is_main_process) as m,
        filling(part, encode) as store,
    ):
        for batch in prefetch(lambda records: encode.load(files, records), batches, config.cache.workers, m):
            store(extract.features(batch.pixels, manifest.blocks), batch)
            m.advance(len(batch.records))
    return sum(stop - start for start, stop in map(manifest.shard_range, pending))
