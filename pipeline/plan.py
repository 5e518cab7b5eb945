"""What a cache would cost, before it is made: `singer cache plan --teacher ... --shards ... --out CACHE`.

The teacher runs for some seconds on images from all over the shards, and every codec is tried on what it gives.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Ragged, Stored, calibrate
from pipeline.cache.growth import Addition, Rows
from pipeline.cache_teacher import Extractor, describe, draw_index, views_of
from pipeline.config import Config
from pipeline.devices import make_accelerator
from pipeline.models import load_teacher
from pipeline.prefetch import prefetch
from pipeline.progress import meter
from pipeline.shards import ImageFile, index_shards, survey
from pipeline.stores import Place, is_remote
from singer.matching import take_patches
from singer.vit import resolve_blocks

_SAMPLE = 64
_SHARES = (1.0, 0.5)
# Of the free disk; the rest is for what else grows there.
_USABLE = 0.95


@dataclass(frozen=True)
class PlanOption:
    """A way to store the features. bytes_per_image: of all blocks and views; total: of all images."""

    codec: str
    token_share: float
    bytes_per_image: int
    total: int
    fits: bool


@dataclass(frozen=True)
class PlanResult:
    """images_per_second: of the teacher with decoding and codec `chosen`; hours: for all views on this one device.

    chosen: the configured codec and share; best_fit: the most exact option that fits the free disk, or None;
    teacher_passes: how often the teacher sees an image, from the cache (`views`) and online (`epochs` a student);
    break_even_students: from how many students on the cache costs less of the teacher than running it online.
    """

    images: int
    views: int
    blocks: tuple[int, ...]
    images_per_second: float
    hours: float
    free_bytes: int | None
    chosen: PlanOption
    best_fit: PlanOption | None
    epochs: int
    break_even_students: int
    options: list[PlanOption]


def plan(config: Config, shards: str | Sequence[str], out: Place | None = None, seconds: float = 20.0) -> PlanResult:
    """Raises ValueError for whatever the user can mend."""
    images = index_shards(shards, config.cache.on_error)
    count = len(images)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, min(count, 16 * _SAMPLE), replace=False))
    found = survey(images.select(chosen), config.cache.workers, config.cache.on_error)
    teacher = load_teacher(config.teacher)
    accelerator = make_accelerator(config.cache.precision)
    teacher.model.to(accelerator.device)
    extract = Extractor(config, teacher, accelerator)
    blocks = tuple(resolve_blocks(config.cache.blocks, extract.teacher.depth))
    rows = Rows(found, 0, config.views.count)
    describe(config, Addition(blocks, rows), extract.teacher)
    index = draw_index(config.views, rows)
    records = rng.permutation(len(index))

    features: dict[int, list[Tensor]] = {b: [] for b in blocks}
    size, done, start = config.cache.batch_size, 0, 0.0
    with ImageFile(found.images) as files, meter("probe", int(seconds), "seconds") as m:
        batches = (np.resize(records, size + i)[i:] for i in range(0, 10**9, size))
        for views in prefetch(lambda r: views_of(files, index, r, teacher.image_size), batches, config.cache.workers):
            outputs = {b: x.cpu() for b, x in extract.features(torch.from_numpy(views), blocks).items()}
            if start == 0.0:  # the first batch warms up
                start = time.perf_counter()
                continue
            done += len(views)
            if sum(len(x) for x in features[blocks[0]]) < _SAMPLE:
                for block, x in outputs.items():
                    features[block].append(x[:_SAMPLE])
            m.advance(0)
            if time.perf_counter() - start > seconds:
                break
    rate = done / (time.perf_counter() - start)
    free = None if out is None or is_remote(out) else free_bytes(Path(out))
    sample = {b: torch.cat(x) for b, x in features.items()}
    options = [
        PlanOption(codec, share, each, each * count, free is None or each * count <= _USABLE * free)
        for codec in CODECS
        if not codec.endswith("-plain")
        for share in sorted({*_SHARES, config.cache.token_share}, reverse=True)
        for each in [config.views.count * record_bytes(sample, codec, share, extract.teacher.prefix_tokens)]
    ]
    own = next(o for o in options if (o.codec, o.token_share) == (config.cache.codec, config.cache.token_share))
    return PlanResult(
        images=count,
        views=config.views.count,
        blocks=blocks,
        images_per_second=rate,
        hours=count * config.views.count / rate / 3600,
        free_bytes=free,
        chosen=own,
        best_fit=next((o for o in sorted(options, key=lambda o: -o.token_share) if o.fits), None),
        epochs=config.distill.epochs,
        break_even_students=-(-config.views.count // config.distill.epochs),
        options=options,
    )


def record_bytes(sample: dict[int, Tensor], codec: str, share: float, prefix: int) -> int:
    """Mean stored bytes of a record, all blocks together; measured, since outliers differ from teacher to teacher."""
    total = 0.0
    for x in sample.values():
        calibration = calibrate(x, prefix)
        patches = x.shape[1] - prefix
        kept = max(1, round(share * patches))
        positions = torch.rand(len(x), patches, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :kept]
        total += sum(map(_bytes, _values(CODECS[codec].encode(take_patches(x, prefix, positions), calibration)))) / len(
            x
        )
    # Per record: the places of its chunks in the shard, and its patches' positions.
    parts = sum(len(CODECS[codec].parts(x.shape[1], x.shape[2])) for x in sample.values())
    return round(total + 16 * parts + (2 * kept if share < 1 else 0))


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder lies or will lie."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _values(stored: Stored) -> list[Tensor]:
    return [part.data if isinstance(part, Ragged) else part for part in stored.values()]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
