"""Repair a cache: compute again what is damaged, where this is possible."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from pipeline.cache.batch_size import as_begun
from pipeline.cache.completion import complete_segment
from pipeline.cache.extract import Extractor
from pipeline.cache.fill import fill
from pipeline.cache.format import COMPLETE, RECORDS, SKIPPED, TAIL, journal_file
from pipeline.cache.index import read_images
from pipeline.cache.segments import Segment
from pipeline.cache.verify.files import metadata, within, zarr_shard_defects, zarr_shard_files
from pipeline.cache.verify.findings import SegmentReport
from pipeline.cache.verify.live import computable
from pipeline.data import ImageFile, Spec, check_images, relocate
from pipeline.runtime.progress import say
from pipeline.storage.tensors import tensor_bytes
from singer.errors import UserError


def repair_segment(
    segment: Segment,
    segments: Sequence[Segment],
    report: SegmentReport,
    extract: Extractor,
    images: Spec | None,
) -> None:
    """Compute and write what is damaged or missing in a segment, where this is possible, and update the report."""
    manifest, store = segment.manifest, segment.store
    again = metadata(manifest)
    if within(segment, TAIL) in report.files:
        again[TAIL] = tensor_bytes(extract.suffix_state(manifest.tail_first_block) or {})
    for name, content in again.items():
        if within(segment, name) not in report.files:
            continue
        if hashlib.sha256(content).hexdigest() == manifest.files.get(name):
            store.write(name, content)
            del report.files[within(segment, name)]
        else:
            say(f"{store.url}/{name} was written by other versions of libraries; restore it from a copy")

    wanted = sorted(report.missing + report.damaged)
    if not computable(segment, report):
        return
    if wanted:
        compute_again(segment, segments, wanted, report, extract, images)
    ends = {within(segment, name): name for name in (COMPLETE, RECORDS, SKIPPED)}
    unfinished = COMPLETE not in store.sizes() or any(place in report.files for place in ends)
    if unfinished and not (report.missing or report.damaged):
        for place, name in ends.items():
            store.remove(name)
            report.files.pop(place, None)
        complete_segment(segment)


def compute_again(
    segment: Segment,
    segments: Sequence[Segment],
    wanted: Sequence[int],
    report: SegmentReport,
    extract: Extractor,
    images: Spec | None,
) -> None:
    """Compute some Zarr shards again and update the report."""
    manifest, store = segment.manifest, segment.store
    digests = None
    with suppress(UserError):  # the digests are not known if the segment was never completed or its index is damaged
        digests = segment.digests() if segment.completion is not None else None
    if digests is not None:
        numbers = np.unique(
            np.concatenate([np.arange(*manifest.zarr_shard_range(s)) for s in wanted]) // manifest.views_each
        )
        with ImageFile(relocate(read_images(store), images)) as files:
            check_images(files, numbers, digests)
    # These files are removed first. If the run dies after this, the segment is incomplete and these Zarr shards are
    # missing, but none is half old and half new.
    store.remove(COMPLETE)
    for shard in wanted:
        store.remove(journal_file(shard))
    fill(segment, wanted, extract.configured(as_begun(extract.config, store)), segments, images, digests)

    report.missing, report.damaged, sizes = [], [], store.sizes()
    for shard in wanted:
        for name in (journal_file(shard), *zarr_shard_files(manifest, shard)):
            report.files.pop(within(segment, name), None)
        found = zarr_shard_defects(segment, sizes, shard)
        if found == {}:
            report.repaired.append(shard)
        else:  # the disk itself fails
            report.damaged.append(shard)
            report.files |= {within(segment, name): why for name, why in (found or {}).items()}
