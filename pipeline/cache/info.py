"""What a cache holds, read from its manifest and journal."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.codecs import CODECS
from pipeline.cache.format import read_manifest
from pipeline.cache.writer import pending_shards


@dataclass(frozen=True)
class CacheInfo:
    """bytes: of all files; ratio: stored size of a record's features against float16; missing: shards still to do."""

    cache: Path
    id: str
    teacher: str
    image_size: int
    precision: str
    blocks: tuple[int, ...]
    tokens: int
    width: int
    codec: str
    images: int
    labelled: int
    records: int
    shards: int
    missing: int
    bytes: int
    bytes_per_record: int
    ratio: float


def cache_info(path: Path) -> CacheInfo:
    """Raises ValueError if there is no cache at `path`; an incomplete one is described too."""
    manifest = read_manifest(path)
    teacher = manifest.teacher
    parts = CODECS[manifest.codec].parts(manifest.tokens, teacher.width)
    record = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts.values())
    return CacheInfo(
        cache=path,
        id=manifest.id(),
        teacher=teacher.name,
        image_size=teacher.image_size,
        precision=teacher.precision,
        blocks=manifest.blocks,
        tokens=manifest.tokens,
        width=teacher.width,
        codec=manifest.codec,
        images=manifest.data.images,
        labelled=manifest.data.labelled,
        records=manifest.records,
        shards=manifest.shards,
        missing=len(pending_shards(path, manifest)),
        bytes=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        bytes_per_record=record * len(manifest.blocks),
        ratio=2 * manifest.tokens * teacher.width / record,
    )
