"""Stage 1: run the teacher once over images and store the features of chosen blocks.

Run it with `singer cache-teacher --teacher vit_large_patch16_224 --images 'train-*.tar' --out CACHE`, on any number of
processes. --resume continues a run that was killed, also with another number of processes, and the result has the same
bytes. --append adds blocks, images, views or another teacher to a cache.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

from accelerate.utils import broadcast_object_list

from pipeline.cache.append import Addition
from pipeline.cache.batch_size import as_begun, with_batch_size
from pipeline.cache.create import STAGE, create_segments, new_manifest
from pipeline.cache.extract import Extractor
from pipeline.cache.fill import fill_segments
from pipeline.cache.index import read_images
from pipeline.cache.manifest import TeacherManifest, read_manifest
from pipeline.cache.pixel_choice import as_stored, with_pixels
from pipeline.cache.segments import read_segments, segments_of
from pipeline.cache.variants import id_of_segments
from pipeline.cache.writer import check_same
from pipeline.checks import check_names
from pipeline.config import Config
from pipeline.data import Images, Spec, list_images, resolve
from pipeline.models.names import local_folder
from pipeline.models.own import Own, object_name
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import own_settings, this_process, with_precision
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.watched_rank import watched
from pipeline.storage import Place, Store, open_store
from pipeline.teachers.teacher import load_teacher
from singer.backbones import resolve_blocks
from singer.errors import UserError


@dataclass(frozen=True)
class CacheResult:
    """The result of a run of stage 1.

    variant: the name of the teacher, as it was run, for refine.teacher and distill.teacher; records, blocks, bytes: of
    the whole cache; skipped: the number of defective images and shards, which skipped.json lists; seconds,
    images_per_second: of this run.
    """

    cache: Place
    id: str
    variant: str
    records: int
    blocks: tuple[int, ...]
    codec: str
    bytes: int
    skipped: int
    left_out: dict[str, int]
    seconds: float
    images_per_second: float


@own_settings()
def cache_teacher(
    config: Config, images: Spec, out: Place, mode: Mode = "new", teacher: Own | None = None
) -> CacheResult:
    """Fill a cache at `out` from some images, see data.specs.resolve.

    teacher: a module of your own with its description, in place of teacher.name. Raises UserError for mistakes that the
    user can fix.
    """
    config = with_precision(config)
    check_names(config, "cache")
    if teacher is not None:
        config = config.changed(teacher={"name": object_name(teacher)})
    inputs = [*resolve(images), *filter(None, [config.teacher.weights, local_folder(config.teacher.name)])]
    check_output(out, mode, STAGE, config, inputs)
    store = open_store(out)
    has_manifest = mode in ("resume", "append") and CACHE_MANIFEST in store.sizes()
    backbone = load_teacher(config.teacher, teacher)
    process = this_process()
    if config.teacher.offload == "auto" and process.num_processes > 1:
        raise UserError("teacher.offload auto takes all GPUs in one process; start one, or take cpu or disk")
    with watched(process, STAGE) as ranks, ExitStack() as claim:
        main = ranks.is_first
        # Shards are indexed before the output is claimed, so that broken shards leave no output. A resumed run has
        # their list already.
        continues = has_manifest and mode == "resume"
        listed = list_images(config, images) if main and not continues else None
        if continues:
            config = as_begun(config, store)
        extract = Extractor(config, backbone, process.device)
        blocks = tuple(resolve_blocks(config.cache.blocks, extract.teacher.depth))
        config = _with_batch_size(extract, ranks)
        if has_manifest:
            config = as_stored(config, read_manifest(store), extract.teacher)
        elif listed is not None:
            whole, freed = Addition(blocks, listed, 0, config.views.count), sum(store.sizes().values())
            config = with_pixels(config, whole, extract.teacher, out, freed if mode == "overwrite" else 0)
        extract = extract.configured(config)

        start, done = time.perf_counter(), 0
        claim.enter_context(claimed_output(out, mode, STAGE, config, seed=None) if main else process_log(out))
        ranks.wait()
        if continues:
            check_begun(config, store, extract.teacher)
        if has_manifest:
            # Segments that an earlier run began are filled first, because only complete segments can be appended to.
            done += fill_segments(store, extract, images if mode == "resume" else None)
        if main and listed is not None:
            create_segments(config, listed, out, mode, extract)
        ranks.wait()
        done += fill_segments(store, extract)
    return _result(out, extract, listed, done, time.perf_counter() - start)


def _result(out: Place, extract: Extractor, listed: Images | None, done: int, seconds: float) -> CacheResult:
    """Return the result of a run that computed `done` views of listed images, None if it found them listed."""
    store = open_store(out)
    segments = segments_of(read_segments(store), extract.teacher)
    return CacheResult(
        cache=out,
        id=id_of_segments(segments),
        variant=extract.teacher.variant,
        records=sum({s.records_key: s.records for s in segments}.values()),
        blocks=tuple(sorted({b for s in segments for b in s.manifest.blocks})),
        codec=extract.config.cache.codec,
        bytes=sum(store.sizes().values()),
        left_out={} if listed is None else dict(listed.left_out),
        skipped=sum({s.records_key: s.completion.skipped for s in segments if s.completion is not None}.values()),
        seconds=seconds,
        images_per_second=done / seconds,
    )


def _with_batch_size(extract: Extractor, ranks: Ranks) -> Config:
    """Return the extractor's configuration with a batch size in the place of auto, the same for all processes."""
    if extract.config.cache.batch_size != "auto":
        return extract.config
    found = with_batch_size(extract.config, extract.empty_batch, extract.device) if ranks.is_first else None
    ranks.wait()
    with ranks.together():
        (of_first,) = broadcast_object_list([found])
    return cast(Config, of_first)


def check_begun(config: Config, store: Store, teacher: TeacherManifest) -> None:
    """Raise UserError, with both values, if the cache was begun with another teacher or other settings."""
    there = read_manifest(store)
    blocks = tuple(resolve_blocks(config.cache.blocks, teacher.depth))
    whole = Addition(blocks, read_images(store), 0, config.views.count)
    check_same(there, new_manifest(config, whole, teacher), store.url)
