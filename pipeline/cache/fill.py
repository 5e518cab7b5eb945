"""Fill the segments of a cache: images -> teacher -> encoded features -> Zarr shards."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np
from accelerate.utils import broadcast_object_list

from pipeline.cache.background_writer import writing
from pipeline.cache.completion import complete_segment
from pipeline.cache.extract import Extractor
from pipeline.cache.format import COMPLETE, SKIPPED
from pipeline.cache.index import read_images
from pipeline.cache.manifest import Manifest
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import Segment, read_segments, segments_of
from pipeline.cache.view_reader import ViewReader
from pipeline.data import ImageFile, Spec, relocate
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter, say
from pipeline.runtime.ranks import current
from pipeline.runtime.shared_counters import shared_counters
from pipeline.storage import Store


def fill_segments(store: Store, extract: Extractor, images: Spec | None = None) -> int:
    """Compute what is missing in this teacher's segments; return the number of records that all processes compute.

    images: where the images of the first segment are now, if they may have moved.
    """
    done, ranks = 0, current()
    segments = read_segments(store)
    for segment in segments_of(segments, extract.teacher):
        lacks = segment.lacks() if ranks.is_first else None
        # All processes use the list of the first one: a fast one may finish a Zarr shard before a slow one lists them.
        of_first = None if lacks is None else segment.pending()
        ranks.wait()
        with ranks.together():
            (pending,) = broadcast_object_list([of_first])
        if pending is None:
            continue
        if ranks.is_first:
            # complete.json has the old checksums, and a Zarr shard that is computed again on another machine may
            # differ in its last bits.
            segment.store.remove(COMPLETE)
        done += fill(segment, pending, extract, segments, None if segment.name else images)
        ranks.wait()
        if ranks.is_first:
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
    """Compute and write the pending Zarr shards, of which each process takes the next one when it is free.

    Return the number of records that all processes compute. segments: all segments of the cache; images: where the
    images are now, if they have moved; digests: those of the images, if they were read before. Raises UserError if
    images are missing or have changed.
    """
    if not pending:
        return 0
    manifest = segment.manifest
    listed = replace(read_images(segment.store), max_pixels=extract.config.data.max_pixels)
    located = relocate(listed, images)
    config, ranks, files = extract.config, current(), ImageFile(located)
    earlier = takewhile(lambda s: s.name != segment.name, segments)
    read = ViewReader(files, manifest, config.data.on_error, earlier, digests, device=extract.device)
    calibration = read_calibration(segment, extract.device)
    size = config.cache.views_at_once
    total = sum(stop - start for start, stop in map(manifest.zarr_shard_range, pending))
    # What is read ahead is taken from the others: one Zarr shard, or up to half of an even share.
    shards = max(1, len(pending) // ranks.world // 2)
    ahead = min(2 * config.cache.workers, -(-manifest.shard_records // size) * shards)
    if ranks.is_first and 0 < len(pending) < manifest.zarr_shards:
        say(f"{manifest.zarr_shards - len(pending)} of {manifest.zarr_shards} Zarr shards are done already")

    with (
        shared_counters(ranks) as add,
        files,
        meter("cache", total, "images", quiet=not ranks.is_first) as m,
        writing(segment, calibration, read.key) as write,
    ):
        batches = _batches(manifest, pending, size, add)
        for batch in prefetch(read, batches, config.cache.workers, m, ahead):
            write(extract.features(batch.pixels, manifest.blocks, batch.copies), batch)
            m.advance(add("records", len(batch.records)) - m.done)
    return total


def _batches(
    manifest: Manifest, pending: Sequence[int], size: int, add: Callable[[str, int], int]
) -> Iterator[np.ndarray]:
    """Yield the records of batches, which are in one Zarr shard each; a Zarr shard is taken with its first batch.

    size: the most records of a batch; add: see shared_counters.
    """
    while (taken := add("taken", 1)) <= len(pending):
        start, stop = manifest.zarr_shard_range(pending[taken - 1])
        for first in range(start, stop, size):
            yield np.arange(first, min(first + size, stop))
