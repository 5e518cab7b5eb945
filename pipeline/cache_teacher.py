"""Stage 1: run the teacher once over WebDataset shards and store the features of chosen blocks.

`singer cache-teacher --teacher vit_large_patch16_224 --shards 'train-*.tar' --out CACHE`. Works on any number of
processes; a run that was killed goes on with --resume, also with another number of processes, and ends with the
same bytes.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration
from pipeline.cache.format import MANIFEST, DataManifest, Index, Manifest, TeacherManifest, read_index
from pipeline.cache.reader import Cache, Encoded, read_calibration
from pipeline.cache.writer import CacheWriter, check_same, create_cache, pending_shards
from pipeline.config import Config, ViewsConfig
from pipeline.devices import make_accelerator
from pipeline.models import Vit, load_teacher, local_folder, weight_hash
from pipeline.outputs import Mode, check_output, claimed_output
from pipeline.prefetch import prefetch
from pipeline.progress import meter, say
from pipeline.shards import NO_LABEL, ImageFile, Images, index_shards
from pipeline.views import draw_view, normalise
from singer.artifacts import clean_mask, patch_norms, robust_threshold
from singer.tail import TeacherTail, tail_state
from singer.vit import block_outputs, depth, grid_size, resolve_blocks

STAGE = "cache-teacher"
_CALIBRATION_RECORDS = 256
# Part of the format: were it an option, two caches of one id could differ.
_CLEAN_SIGMAS = 6.0
_MAX_SHARD_RECORDS = 4096


@dataclass(frozen=True)
class CacheResult:
    """What a run of stage 1 did. bytes: of the whole cache; seconds, images_per_second: of this run."""

    cache: Path
    id: str
    records: int
    blocks: tuple[int, ...]
    codec: str
    bytes: int
    seconds: float
    images_per_second: float


def cache_teacher(config: Config, shards: str | Sequence[str], out: Path, mode: Mode = "new") -> CacheResult:
    """Fill a cache at `out` from the images in `shards`. Raises ValueError for whatever the user can mend."""
    check_codec(config.cache.codec)
    images = index_shards(shards)
    inputs = [*images.paths, *filter(None, [config.teacher.weights, local_folder(config.teacher.name)])]
    check_output(out, mode, STAGE, config, inputs)
    teacher = load_teacher(config.teacher)
    blocks = resolve_blocks(config.cache.blocks, depth(teacher.model))
    manifest = describe(config, teacher, blocks, images)
    tail = tail_state(teacher.model.state_dict(), blocks[0])
    # Built here for a look: a teacher whose tail cannot be rebuilt must fail before hours of work.
    TeacherTail(teacher.architecture, teacher.model_args, blocks[0], tail)
    accelerator = make_accelerator(config.cache.precision)
    teacher.model.to(accelerator.device)
    extract = Extractor(config, teacher, blocks, accelerator)

    start = time.perf_counter()
    claim = claimed_output(out, mode, STAGE, config, seed=None) if accelerator.is_main_process else nullcontext()
    with ImageFile(images) as files, claim:
        if accelerator.is_main_process:
            if mode == "resume" and (out / MANIFEST).exists():
                check_same(out, manifest)
            else:
                index = draw_index(config.views, images, files, config.cache.workers)
                create_cache(out, manifest, index, tail, extract.calibrate(files, index))
        accelerator.wait_for_everyone()
        done = _fill(config, out, extract, files, accelerator)
        accelerator.wait_for_everyone()
    cache = Cache(out)
    seconds = time.perf_counter() - start
    return CacheResult(
        cache=out,
        id=cache.id,
        records=len(cache),
        blocks=cache.blocks,
        codec=manifest.codec,
        bytes=sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        seconds=seconds,
        images_per_second=done / seconds,
    )


def check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"cache.codec: no codec {codec!r}; known: {', '.join(CODECS)}")


def describe(config: Config, teacher: Vit, blocks: list[int], images: Images) -> Manifest:
    """The manifest: all that the features depend on, known before any is computed."""
    parts = CODECS[config.cache.codec].parts(teacher.prefix + int(np.prod(grid_size(teacher.model))), teacher.width)
    record_bytes = max(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in parts.values())
    shard_records = min(_MAX_SHARD_RECORDS, max(1, config.cache.shard_mb * 2**20 // record_bytes))
    records = len(images) * config.views.count
    return Manifest(
        teacher=TeacherManifest(
            name=config.teacher.name,
            architecture=teacher.architecture,
            model_args=teacher.model_args,
            weights=weight_hash(teacher.model.state_dict()),
            depth=depth(teacher.model),
            width=teacher.width,
            prefix_tokens=teacher.prefix,
            class_token=teacher.has_cls,
            grid=grid_size(teacher.model),
            image_size=teacher.image_size,
            mean=teacher.mean,
            std=teacher.std,
            precision=config.cache.precision,
        ),
        data=DataManifest(
            shards=tuple(p.name for p in images.paths),
            images=len(images),
            labelled=int((images.labels != NO_LABEL).sum()),
            hash=images.content_hash(),
        ),
        views=config.views.model_dump(mode="json"),
        blocks=tuple(blocks),
        codec=config.cache.codec,
        records=records,
        shard_records=min(shard_records, records),
        tail_first_block=blocks[0],
    )


def draw_index(views: ViewsConfig, images: Images, files: ImageFile, workers: int) -> Index:
    """Number the records and fix every one's view. Record = image · views + view."""
    image = np.repeat(np.arange(len(images)), views.count)
    view = np.tile(np.arange(views.count), len(images))

    def draw(record: int) -> tuple[tuple[float, float, float, float], bool]:
        number = int(image[record])
        drawn = draw_view(views, images.keys[number], int(view[record]), files.dimensions(number))
        return drawn.box, drawn.flip

    drawn = list(prefetch(draw, range(len(image)), workers))
    box = np.array([b for b, _ in drawn], dtype=np.float64)
    flip = np.array([f for _, f in drawn], dtype=np.bool_)
    return Index(images, image, view, box, flip)


class Extractor:
    """Images of records -> features of the wanted blocks."""

    def __init__(self, config: Config, teacher: Vit, blocks: list[int], accelerator: Accelerator) -> None:
        self._config, self._teacher, self._blocks = config, teacher, blocks
        self._accelerator = accelerator

    def pixels(self, files: ImageFile, index: Index, records: np.ndarray) -> Tensor:
        """(n, size, size, 3) uint8: the views of some records at the teacher's resolution."""
        return index.pixels(files, records, self._teacher.image_size)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> dict[int, Tensor]:
        """{block: (n, N, d) float32}."""
        images = normalise(pixels, self._teacher.mean, self._teacher.std, self._accelerator.device)
        with self._accelerator.autocast():
            outputs = block_outputs(self._teacher.model, images, self._blocks)
        return {block: x.float() for block, x in outputs.items()}

    def calibrate(self, files: ImageFile, index: Index) -> dict[int, Calibration]:
        """Statistics of clean patch tokens on a fixed sample that is spread over all records."""
        count = min(_CALIBRATION_RECORDS, len(index))
        records = np.linspace(0, len(index) - 1, count).round().astype(np.int64)
        batches = np.array_split(records, -(-count // self._config.cache.batch_size))
        features = [self.features(self.pixels(files, index, batch)) for batch in batches]
        for batch, outputs in zip(batches, features, strict=True):
            for block, x in outputs.items():
                _check_finite(x, block, batch, index)
        calibration = {}
        for block in self._blocks:
            x = torch.cat([f[block].cpu() for f in features])
            norms = patch_norms(x, self._teacher.prefix)
            clean = x[:, self._teacher.prefix :][clean_mask(norms, robust_threshold(norms, _CLEAN_SIGMAS))].double()
            std = clean.std(0, correction=0)
            # A channel that never varies would divide by zero.
            std = std.clamp_min(1e-3 * float(std.mean()) + 1e-12)
            calibration[block] = Calibration(clean.mean(0).float(), std.float())
        return calibration


def _fill(config: Config, out: Path, extract: Extractor, files: ImageFile, accelerator: Accelerator) -> int:
    """Compute and write this process's share of the missing shards; the number of records that all processes do."""
    writer = CacheWriter(out)
    manifest = writer.manifest
    index = _same_index(out, files.images)
    codec = CODECS[manifest.codec]
    calibration = read_calibration(out, manifest.blocks, accelerator.device)
    pending = pending_shards(out, manifest)
    mine = pending[accelerator.process_index :: accelerator.num_processes]
    size = config.cache.batch_size
    ranges = [manifest.shard_range(s) for s in mine]
    batches = [np.arange(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size)]
    total = sum(stop - start for start, stop in ranges)
    if accelerator.is_main_process and len(pending) < manifest.shards:
        say(f"{manifest.shards - len(pending)} of {manifest.shards} shards are done already")

    with meter("cache", total, "images", quiet=not accelerator.is_main_process) as m:
        loaded = prefetch(lambda r: (r, extract.pixels(files, index, r)), batches, config.cache.workers, m)
        for shard, (_, stop) in zip(mine, ranges, strict=True):
            buffer: list[Encoded] = []
            for records, pixels in loaded:
                encoded: Encoded = {}
                for block, x in extract.features(pixels).items():
                    _check_finite(x, block, records, index)
                    parts = codec.encode(x, calibration[block])
                    encoded[block] = {name: part.cpu() for name, part in parts.items()}
                buffer.append(encoded)
                m.advance(len(records))
                if records[-1] == stop - 1:
                    break
            writer.write(
                shard,
                {
                    block: {name: torch.cat([e[block][name] for e in buffer]).numpy() for name in parts}
                    for block, parts in buffer[0].items()
                },
            )
    return sum(stop - start for start, stop in map(manifest.shard_range, pending))


def _same_index(out: Path, images: Images) -> Index:
    index = read_index(out)
    return Index(images, index.image, index.view, index.box, index.flip)


def _check_finite(x: Tensor, block: int, records: np.ndarray, index: Index) -> None:
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        key = index.images.keys[int(index.image[records[int(bad.nonzero()[0])]])]
        raise ValueError(f"block {block} gives NaN or Inf for image {key!r}; run the teacher with cache.precision no")
