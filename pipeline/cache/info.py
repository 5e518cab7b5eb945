"""What a cache holds, read from its manifests and journals."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.format import FIDELITY
from pipeline.cache.manifest import Manifest
from pipeline.cache.segments import Segment, read_segments
from pipeline.cache.variants import joint_id, variants_of
from pipeline.storage import Place, open_store
from pipeline.storage.outputs import read_json


@dataclass(frozen=True)
class TeacherInfo:
    """One teacher's features in a cache. records: views of images; missing: shards still to do.

    variant: names it in refine.teacher and distill.teacher; feature_bytes: of its stored features; ratio: how many
    times smaller than float16 of all tokens; fidelity: {block: norms of patch tokens, errors of the codec on prefix,
    clean and artifact tokens} as measured when the block was first cached, on a sample of its records.
    """

    variant: str
    name: str
    weights: str
    id: str | None
    image_size: int
    precision: str
    blocks: tuple[int, ...]
    tokens: int
    width: int
    codec: str
    lossless: str
    records: int
    shards: int
    missing: int
    feature_bytes: int
    ratio: float
    fidelity: dict[int, Any]


@dataclass(frozen=True)
class CacheInfo:
    """images, labelled: of all parts; views: how they were drawn, and the largest number of an image; bytes: of all."""

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
    """Raises UserError if there is no cache at `place`; an incomplete one is described too."""
    store = open_store(place)
    parts = read_segments(store)
    manifests = [p.manifest for p in parts]
    by_images = {m.data.hash: m.data for m in manifests}
    return CacheInfo(
        cache=place,
        version=manifests[0].version,
        images=sum(d.images for d in by_images.values()),
        labelled=sum(d.labelled for d in by_images.values()),
        views=_views(manifests),
        pixels=next((m.pixels.kind for m in manifests if m.pixels), "none"),
        parts=len(parts),
        bytes=sum(store.sizes().values()),
        teachers=[_teacher_info(p) for p in variants_of(parts)],
    )


def _views(manifests: list[Manifest]) -> dict[str, Any]:
    settings = {k: v for k, v in manifests[0].views.items() if k != "first"}
    return settings | {"count": max(m.views.get("first", 0) + m.views["count"] for m in manifests)}


def _teacher_info(parts: list[Segment]) -> TeacherInfo:
    first = parts[0].manifest
    stored = exact = missing = 0
    fidelity: dict[int, Any] = {}
    for part in parts:
        m, entries = part.manifest, part.entries()
        pending = set(part.pending(entries))
        missing += len(pending)
        for shard, entry in entries.items():
            if shard not in pending:
                stored += sum(f["bytes"] for n, f in entry["files"].items() if n.startswith("features/"))
                exact += float16_bytes(m) * int(np.subtract(*m.shard_range(shard)[::-1]))
        if FIDELITY in m.files:
            figures = read_json(part.store, FIDELITY, "part of a cache")
            fidelity |= {b: figures.get(str(b)) for b in m.blocks}
    return TeacherInfo(
        variant=first.teacher.variant,
        name=first.teacher.name,
        weights=first.teacher.weights,
        id=None if any(p.lacks() for p in parts) else joint_id(parts),
        image_size=first.teacher.image_size,
        precision=first.teacher.precision,
        blocks=tuple(sorted({b for p in parts for b in p.manifest.blocks})),
        tokens=first.tokens,
        width=first.teacher.width,
        codec=first.codec,
        lossless=first.lossless,
        records=sum({p.manifest.rows(): p.manifest.records for p in parts}.values()),
        shards=sum(p.manifest.shards for p in parts),
        missing=missing,
        feature_bytes=stored,
        ratio=exact / stored if stored else 0.0,
        fidelity=dict(sorted(fidelity.items())),
    )


def float16_bytes(m: Manifest) -> int:
    """Bytes of a record if all its tokens were stored as float16."""
    return 2 * (m.teacher.prefix_tokens + m.teacher.patches) * m.teacher.width * len(m.blocks)
