"""Describe what a cache holds, from its manifests and journals."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.format import FIDELITY
from pipeline.cache.manifest import Manifest
from pipeline.cache.segments import Segment, read_segments
from pipeline.cache.variants import id_of_segments, variants_of
from pipeline.storage import Place, open_store
from pipeline.storage.json_files import read_json
from singer.sizes import ImageSize


@dataclass(frozen=True)
class TeacherInfo:
    """One teacher's features in a cache.

    variant: its name in refine.teacher and distill.teacher; id: the id of the cache for this teacher, None if it is
    incomplete; copies: of each view, over which features are averaged; tokens: stored tokens per record; records: views
    of images; missing: Zarr shards that are not done yet; feature_bytes: the size of its stored features; ratio: how
    many times smaller they are than float16 of all tokens; fidelity: {block: norms of patch tokens, errors of the codec
    on prefix, clean and artifact tokens}, measured on a sample of the records when the block was first cached.
    """

    variant: str
    name: str
    weights: str
    id: str | None
    image_size: ImageSize
    precision: str
    copies: int
    blocks: tuple[int, ...]
    tokens: int
    width: int
    codec: str
    records: int
    zarr_shards: int
    missing: int
    feature_bytes: int
    ratio: float
    fidelity: dict[int, Any]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

    images, labelled: the number of images in all segments, and of those with a label; views: how views were drawn, and
    as `count` the largest number of views of an image; parts: the number of segments; bytes: the size of all files.
    """

    cache: Place
    version: int
    images: int
    labelled: int
    views: dict[str, Any]
    pixels: str
    parts: int
    bytes: int
    teachers: list[TeacherInfo]


def cache_info(place: Place) -> CacheInfo:
    """Describe a cache, complete or not. Raises UserError if there is no cache at `place`."""
    store = open_store(place)
    segments = read_segments(store)
    manifests = [s.manifest for s in segments]
    by_images = {m.data.hash: m.data for m in manifests}
    return CacheInfo(
        cache=place,
        version=manifests[0].version,
        images=sum(d.images for d in by_images.values()),
        labelled=sum(d.labelled for d in by_images.values()),
        views=_views(manifests),
        pixels=next((m.pixels.kind for m in manifests if m.pixels), "none"),
        parts=len(segments),
        bytes=sum(store.sizes().values()),
        teachers=[_teacher_info(variant) for variant in variants_of(segments)],
    )


def _views(manifests: list[Manifest]) -> dict[str, Any]:
    settings = {k: v for k, v in manifests[0].views.items() if k != "first"}
    return settings | {"count": max(m.views["first"] + m.views["count"] for m in manifests)}


def _teacher_info(segments: list[Segment]) -> TeacherInfo:
    first = segments[0].manifest
    stored = exact = missing = 0
    fidelity: dict[int, Any] = {}
    for segment in segments:
        m, entries = segment.manifest, segment.entries()
        pending = set(segment.pending(entries))
        missing += len(pending)
        for shard, entry in entries.items():
            if shard not in pending:
                stored += sum(f["bytes"] for n, f in entry["files"].items() if n.startswith("features/"))
                exact += float16_bytes(m) * int(np.subtract(*m.zarr_shard_range(shard)[::-1]))
        measured = read_json(segment.store, FIDELITY, "segment of a cache")
        fidelity |= {b: measured.get(str(b)) for b in m.blocks}
    return TeacherInfo(
        variant=first.teacher.variant,
        name=first.teacher.name,
        weights=first.teacher.weights,
        id=None if any(s.lacks() for s in segments) else id_of_segments(segments),
        image_size=first.teacher.image_size,
        precision=first.teacher.precision,
        copies=first.teacher.copies,
        blocks=tuple(sorted({b for s in segments for b in s.manifest.blocks})),
        tokens=first.tokens_of(max(first.blocks)),
        width=first.teacher.width_of(max(first.blocks)),
        codec=first.codec,
        records=sum({s.manifest.listed_key(): s.manifest.records for s in segments}.values()),
        zarr_shards=sum(s.manifest.zarr_shards for s in segments),
        missing=missing,
        feature_bytes=stored,
        ratio=exact / stored if stored else 0.0,
        fidelity=dict(sorted(fidelity.items())),
    )


def float16_bytes(m: Manifest) -> int:
    """Return the size of a record in bytes if all its tokens were stored as float16."""
    teacher = m.teacher
    return sum(2 * (teacher.prefix_tokens + teacher.patches_of(b)) * teacher.width_of(b) for b in m.blocks)
