"""Fill the segments of a cache: images -> teacher -> encoded features -> Zarr shards."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np
from accelerate.utils import broadcast_object_list

from pipeline.cache.background_writer import writing
from pipeline.cache.completion import complete_segment
from pipeline.cache.extract import Extractor
from pipeline.cache.format import COMPLETE, SKIPPED
from pipeline.cache.index import read_images
from pipeline.cache.rows import RowReader
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import Segment, read_segments, segments_of
from pipeline.data import ImageFile, Spec, relocate
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter, say
from pipeline.runtime.ranks import current
from pipeline.storage import Store


def fill_segments(store: Store, extract: Extractor, images: Spec | None = None) -> int:
    """Compute what is missing in this teacher's segments; return the number of records that all processes compute.

    images: where the images of the first segment are now, if they may have moved.
    """
    done, accelerator, ranks = 0, extract.accelerator, current()
    segments = read_segments(store)
    for segment in segments_of(segments, extract.teacher):
        lacks = segment.lacks() if accelerator.is_main_process else None
        # All processes use the list of the first one: a fast one may finish a Zarr shard before a slow one lists them.
        of_first = None if lacks is None else segment.pending()
        ranks.wait()
        with ranks.together():
            (pending,) = broadcast_object_list([of_first])
        if pending is None:
            continue
        if accelerator.is_main_process:
            # complete.json has the old checksums, and a Zarr shard that is computed again on another machine may
            # differ in its last bits.
            segment.store.remove(COMPLETE)
        done += fill(segment, pending, extract, segments, None if segment.name else images)
        ranks.wait()
        if accelerator.is_main_process:
            left_out = complete_segment(segment)
            if left_out:
                say(f"{left_out} images cannot be decoded and are left out; {segment.store.url}/{SKIPPED} lists them")
        ranks.wait()
    return done


def fill(
    segment: Segment,
    pending: Sequence[int],
    extract: Extractor,
    segments: Sequence[Segment],
    images: Spec | None = None,
    digests: np.ndarray | None = None,
) -> int:
    """Compute and write this process's share of the pending Zarr shards.

    Return the number of records that all processes compute. segments: all segments of the cache; images: where the
    images are now, if they have moved; digests: those of the images, if they were read before. Raises UserError if
    images are missing or have changed.
    """
    if not pending:
        return 0
    manifest = segment.manifest
    listed = replace(read_images(segment.store, manifest.data.decoding), max_pixels=extract.config.data.max_pixels)
    located = relocate(listed, images)
    config, accelerator, files = extract.config, extract.accelerator, ImageFile(located)
    earlier = takewhile(lambda s: s.name != segment.name, segments)
    read = RowReader(files, manifest, config.cache.on_error, earlier, digests)
    calibration = read_calibration(segment, extract.device)
    own = pending[accelerator.process_index :: accelerator.num_processes]
    size = config.cache.views_at_once
    ranges = [manifest.zarr_shard_range(shard) for shard in own]
    batches = (np.arange(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size))
    total = sum(stop - start for start, stop in ranges)
    if accelerator.is_main_process and 0 < len(pending) < manifest.zarr_shards:
        say(f"{manifest.zarr_shards - len(pending)} of {manifest.zarr_shards} Zarr shards are done already")

    with (
        files,
        meter("cache", total, "images", quiet=not accelerator.is_main_process) as m,
        writing(segment, calibration, read.key) as write,
    ):
        for batch in prefetch(read, batches, config.cache.workers, m):
            write(extract.features(batch.pixels, manifest.blocks, batch.copies), batch)
            m.advance(len(batch.records))
    return sum(stop - start for start, stop in map(manifest.zarr_shard_range, pending))
