"""Filling the segments of a cache: images -> teacher -> encoded features -> shards."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np
from accelerate.utils import broadcast_object_list

from pipeline.cache.background_writer import filling
from pipeline.cache.completion import complete_segment
from pipeline.cache.encode import Encoder, calibration_on
from pipeline.cache.extract import Extractor
from pipeline.cache.format import COMPLETE, SKIPPED
from pipeline.cache.index import read_images
from pipeline.cache.manifest import Manifest
from pipeline.cache.rows import RowReader, Rows
from pipeline.cache.segments import Segment, mine, read_segments
from pipeline.data import ImageFile, Images, decoding_quietly, listing_hash, relocate
from pipeline.data.prefetch import prefetch
from pipeline.runtime.progress import meter, say
from pipeline.runtime.ranks import current
from pipeline.storage import Store


def rows_of(manifest: Manifest, images: Images, earlier: Iterable[Segment]) -> Rows:
    """The records of a part. earlier: parts; of one with the same images, digests and perhaps views are known."""
    for part in earlier:
        if part.lacks() is None:
            index = part.index()
            if listing_hash(index.images) == manifest.data.hash:
                return Rows.of(manifest, images, index.digest, index if part.manifest.views == manifest.views else None)
    return Rows.of(manifest, images)


def fill_segments(store: Store, extract: Extractor, shards: str | Sequence[str] | None = None) -> int:
    """Fill this teacher's parts as far as they are not; the number of records that all processes do.

    shards: where the images of the first part lie now, if they may have moved.
    """
    done, accelerator, ranks = 0, extract.accelerator, current()
    parts = read_segments(store)
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
            left_out = complete_segment(part)
            if left_out:
                say(f"{left_out} images cannot be decoded and are left out; {part.store.url}/{SKIPPED} lists them")
        ranks.wait()
    return done


def fill(
    part: Segment,
    pending: Sequence[int],
    extract: Extractor,
    parts: Sequence[Segment],
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
