"""Complete a segment: what was found when images were read for the teacher becomes its index."""

import hashlib

import numpy as np

from pipeline.cache.format import COMPLETE, RECORDS, SKIPPED, VIEWS, zarr_shard_file
from pipeline.cache.index import Index, number_records, read_images
from pipeline.cache.manifest import Completion
from pipeline.cache.segment_reader import SegmentReader
from pipeline.cache.segments import Segment
from pipeline.data import Skipped, content_hash
from pipeline.data.source_listing import NO_LABEL
from pipeline.storage.json_files import json_bytes
from singer.errors import UserError


def complete_segment(segment: Segment) -> int:
    """Write the index and complete.json of a segment, once all its Zarr shards are done.

    Return how many images are left out. Raises UserError if none of its images can be decoded.
    """
    done, small = describe_completion(segment)
    for name, content in small.items():
        segment.store.write(name, content)
    segment.store.write(COMPLETE, done.to_bytes())
    return segment.manifest.data.images - done.images


def describe_completion(segment: Segment) -> tuple[Completion, dict[str, bytes]]:
    """Return the content of complete.json, and the other small files that are written at the end.

    Both depend only on what the segment holds.
    """
    manifest, entries = segment.manifest, segment.entries()
    files = {n: f for entry in entries.values() for n, f in entry["files"].items()}
    stored = SegmentReader(segment, files).read(VIEWS, np.arange(manifest.records))
    found = stored.numpy().reshape(-1).view(manifest.view_form)  # type: ignore[union-attr]
    listed = read_images(segment.store)
    # All views of an image have the same digest and size.
    of_image = found[:: manifest.views_each]
    good = of_image["width"] > 0
    reasons = {int(n): why for entry in entries.values() for n, why in entry["unreadable"].items()}
    skipped = [*listed.skipped, *(_skip(listed.paths[int(listed.container[n])].name, listed.keys[n], reasons[n])
                                  for n in np.flatnonzero(~good).tolist())]  # fmt: skip
    if not good.any():
        raise UserError(f"none of {len(listed)} images can be decoded; the first: {skipped[len(listed.skipped)]}")
    images = listed if good.all() else listed.select(np.flatnonzero(good))
    rows = found if good.all() else found[np.repeat(good, manifest.views_each)]
    image, view = number_records(len(images), manifest.views["first"], manifest.views_each)
    color = rows["color"] if "color" in (rows.dtype.names or ()) else None
    index = Index(images, of_image["digest"][good], image, view, rows["box"], rows["flip"], color)
    small = {RECORDS: index.record_bytes()} | ({SKIPPED: json_bytes([vars(s) for s in skipped])} if skipped else {})
    done = Completion(
        part=manifest.id(),
        hash=content_hash(images, index.digest),
        images=len(images),
        labelled=int((images.labels != NO_LABEL).sum()),
        records=len(index),
        unreadable=tuple(np.flatnonzero(~good).tolist()),
        skipped=len(skipped),
        files={name: hashlib.sha256(content).hexdigest() for name, content in small.items()},
        arrays={
            name: [
                (files[file]["bytes"], files[file]["sha256"])
                for file in (zarr_shard_file(name, form, shard) for shard in range(manifest.zarr_shards))
            ]
            for name, form in manifest.arrays().items()
        },
    )
    return done, small


def _skip(shard: str, key: str, reason: str) -> Skipped:
    return Skipped(shard, key, f"cannot be decoded: {reason}")
