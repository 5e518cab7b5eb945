"""The cost of a cache before it is made: `singer cache plan --teacher ... --images ... --out CACHE`.

The real stages run for some seconds on images from all over the shards, in a temporary folder on the disk where the
cache would be. Every codec is tried. A figure that was not measured is None, and no figure is estimated from it.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, calibrate, few_records
from pipeline.cache.codecs import CODECS, naming
from pipeline.cache.format import FEATURES, JOURNAL, POSITIONS, TAIL
from pipeline.cache.quantization import fidelity
from pipeline.cache.stored import Ragged
from pipeline.cache.zarr_shards import pack_shard
from pipeline.config import Config
from pipeline.data import ImageFile, Images, Spec, list_images
from pipeline.planning.costs import (
    Rate,
    StudentCost,
    Work,
    bottleneck,
    break_even,
    cached_hours,
    caching_hours,
    online_hours,
    slowest,
    student_costs,
    verdict,
)
from pipeline.planning.pilot import Pilot
from pipeline.planning.sample import Sample, Teacher
from pipeline.planning.scratch import existing, scratch
from pipeline.planning.speeds import Speeds, measure_speeds, no_speeds
from pipeline.runtime.devices import make_accelerator, with_precision
from pipeline.runtime.machine import memory_bytes
from pipeline.stages.cache_teacher import check_codec
from pipeline.storage import Place, is_remote, open_store
from pipeline.storage.outputs import PROVENANCE
from pipeline.storage.resuming import CONFIG
from pipeline.teachers.backbone import Backbone
from pipeline.teachers.models import load_teacher
from pipeline.teachers.placement import parameters, weight_bytes
from singer.backbones import depth, resolve_blocks
from singer.errors import UserError
from singer.matching import take_patches

# At most so many images are drawn. Features are kept of at most so many records and bytes.
_IMAGES = 1024
_RECORDS = 32
_FEATURE_BYTES = 2**30
_SHARES = (1.0, 0.5)
# The share of the free disk that a cache may fill; the rest is for other files.
_USABLE = 0.95
_END_OF_SHARD = 4
# The files of a cache that do not grow with its records; all others do.
_FIXED = (
    "tail.safetensors",
    "calibration.safetensors",
    "fidelity.json",
    "manifest.json",
    "complete.json",
    "zarr.json",
    CONFIG,
    PROVENANCE,
)
_INDEX_ENTRY = 16


@dataclass(frozen=True)
class PlanOption:
    """A way to store the features.

    error: the relative quantization error of clean patch tokens, at the worst block; bytes_per_image: of the features
    of all blocks and views; bytes: of the whole cache; fits: whether it fits on the free disk; max_views, max_blocks:
    how many views of these blocks, and how many blocks of these views, would fit. The last three are None if the disk
    is not known.
    """

    codec: str
    token_share: float
    error: float
    bytes_per_image: int
    bytes: int
    fits: bool | None
    max_views: int | None
    max_blocks: int | None


@dataclass(frozen=True)
class Stage:
    """The measured speed of a stage.

    per_second: views; spread_percent: half of the range of the repeats, in percent of their mean; status: "measured",
    perhaps with an extent, or "not measured: " and the reason. In the second case per_second is None.
    """

    stage: str
    per_second: float | None
    spread_percent: float | None
    status: str

    @classmethod
    def of(cls, name: str, rate: Rate) -> "Stage":
        """Return the stage of this name with its rate."""
        spread = None if rate.spread is None else 100 * rate.spread
        return cls(name, rate.per_second, spread, rate.status)


@dataclass(frozen=True)
class PlanResult:
    """The result of a plan. A figure that was not measured is None; `stages` gives the reason.

    teacher_parameters, teacher_bytes: the number of the teacher's parameters, and the memory that they take;
    images_per_second: views that cache-teacher stores in a second; hours: the time that it takes for all views;
    caching_bottleneck, training_bottleneck: the slowest stage; students: hours until 1, 5 and 20 students are trained
    for `epochs` passes over all views, with the teacher in every step, or from the cache with caching included;
    break_even_students: the smallest number of students for which the cache takes no longer, which `verdict` gives in
    words; targets: the targets of the student that was measured; written_bytes: the bytes that were written to measure
    the disk; tail_bytes: the size of the teacher's suffix, which every option stores once; free_bytes: the free space
    where the cache would be; chosen: the option that is configured; best_fit: the best option that fits: with the most
    tokens, then with the smallest error.
    """

    images: int
    views: int
    teacher_parameters: int
    teacher_bytes: int
    blocks: tuple[int, ...]
    pixels: str
    epochs: int
    images_per_second: float | None
    hours: float | None
    caching_bottleneck: str | None
    training_bottleneck: str | None
    students: list[StudentCost]
    break_even_students: int | None
    verdict: str
    targets: str
    stages: list[Stage]
    written_bytes: int
    tail_bytes: int
    free_bytes: int | None
    chosen: PlanOption
    best_fit: PlanOption | None
    options: list[PlanOption]


def plan(config: Config, images: Spec, out: Place | None = None, seconds: float = 20.0) -> PlanResult:
    """Run the real stages for some seconds in a temporary place beside `out`, and return what a cache would cost.

    out: where the cache would be; without it, neither the disk nor the hours with a cache are measured. seconds: how
    long caching runs, and how long the disk is written to at most; each other stage runs for a quarter of it. With 0,
    only bytes are measured. Raises UserError for mistakes that the user can fix.
    """
    config = with_precision(config)
    check_codec(config.cache.codec)
    listed = list_images(config, images)
    backbone = load_teacher(config.teacher)
    blocks = tuple(resolve_blocks(config.cache.blocks, depth(backbone.model)))
    device = make_accelerator(config.cache.precision).device
    with ExitStack() as stack:
        place = stack.enter_context(scratch(out)) if out is not None else None
        local = Path(place) if place is not None and not is_remote(place) else None
        if local is not None:
            local.mkdir(exist_ok=True)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="singer-plan-", dir=local)))
        drawn = draw_images(config, listed)
        sample = Sample(config, drawn, stack.enter_context(ImageFile(drawn)))
        teacher = Teacher(config, backbone, blocks, device)
        features = sample_features(config, sample, teacher)
        calibration = {b: calibrate(x, backbone.prefix) for b, x in features.items()}
        pilot = Pilot(config, sample, work / "cache" if place is None or local else f"{place}/cache", work)
        free = free_bytes(Path(out)) if out is not None and local is not None else None
        scale = Scale(config, backbone, len(listed), features, calibration, pilot.sizes(), pilot.first.records, free)
        uneven = len(set(backbone.layout)) > 1  # then all tokens are stored
        shares = [1.0] if uneven else sorted({*_SHARES, config.cache.token_share}, reverse=True)
        codecs = [c for c in CODECS if not c.endswith("-plain") or c == config.cache.codec]
        options = [option for codec in codecs for option in scale.options(codec, shares)]
        chosen = next(o for o in options if (o.codec, o.token_share) == (config.cache.codec, config.cache.token_share))
        speeds = no_speeds("--seconds 0")
        if seconds > 0:
            store = open_store(place) if place is not None else None
            speeds = measure_speeds(listed, sample, teacher, calibration, pilot, store, free, chosen.bytes, seconds)
    fitting = [o for o in options if o.fits]
    return PlanResult(
        images=len(listed),
        views=config.views.count,
        teacher_parameters=parameters(backbone.model),
        teacher_bytes=weight_bytes(backbone.model),
        blocks=blocks,
        pixels=config.views.pixels,
        epochs=config.distill.epochs,
        **judge(Work(len(listed), config.views.count, config.distill.epochs), speeds, chosen.bytes),
        tail_bytes=scale.tail_bytes,
        free_bytes=free,
        chosen=chosen,
        best_fit=min(fitting, key=lambda o: (-o.token_share, o.error), default=None),
        options=options,
    )


def judge(work: Work, speeds: Speeds, cache_bytes: int) -> dict[str, Any]:
    """Return the fields of a PlanResult that follow from speeds; cache_bytes: the size of the whole cache."""
    caching, training = speeds.caching, speeds.training
    # "caching" overlaps reading and writing, but its bytes are too few to slow a disk down; so both count alone, too.
    together = slowest([caching["caching"], caching["images"], caching["writing"]])
    parts = {name: rate for name, rate in caching.items() if name != "caching"}
    in_memory = cache_bytes <= memory_bytes()
    hours = caching_hours(work, together, speeds.setup_seconds)
    cached = cached_hours(work, training["cached"], training["reading"], in_memory)
    online = online_hours(work, training["online"])
    student_stages = {name: training[name] for name in ("reading", "student images", "student")}
    return {
        "images_per_second": together.per_second,
        "hours": hours,
        "caching_bottleneck": bottleneck(parts, together),
        "training_bottleneck": bottleneck(student_stages, training["cached"]),
        "students": student_costs(hours, cached, online),
        "break_even_students": break_even(hours, cached, online),
        "verdict": verdict(hours, cached, online),
        "targets": speeds.targets,
        "stages": [Stage.of(name, rate) for name, rate in {**caching, **training}.items()],
        "written_bytes": speeds.written_bytes,
    }


def draw_images(config: Config, listed: Images) -> Images:
    """Return some of the images, from all over the shards.

    Broken images are left out if cache.on_error is skip. Raises UserError if none can be decoded.
    """
    chosen = np.sort(np.random.default_rng(0).choice(len(listed), min(len(listed), _IMAGES), replace=False))
    images = listed.select(chosen)
    if config.cache.on_error == "fail":
        return images
    with ImageFile(images) as files:
        whole = [n for n in range(len(images)) if readable(files, n)]
    if not whole:
        raise UserError(f"none of {len(images)} images can be decoded; the first is {images.keys[0]!r}")
    return images.select(np.array(whole))


def readable(files: ImageFile, number: int) -> bool:
    """Return whether an image can be decoded."""
    try:
        files.read(number)
    except UserError:
        return False
    return True


def sample_features(config: Config, sample: Sample, teacher: Teacher, most: int = _RECORDS) -> dict[int, Tensor]:
    """Return {block: features (n, N, d)} of at most `most` records, on the teacher's device.

    Raises UserError if they are not finite.
    """
    backbone, size = teacher.backbone, config.cache.batch_size
    tokens = backbone.prefix + backbone.grid[0] * backbone.grid[1]
    record_bytes = 4 * len(teacher.blocks) * tokens * backbone.width
    count = min(len(sample), most, _RECORDS, max(1, _FEATURE_BYTES // record_bytes))
    (records, *_) = sample.batches(count)
    outputs = []
    for start in range(0, count, size):
        views = sample.load(records[start : start + size], backbone.image_size)
        outputs.append(teacher(views))
    features = {b: torch.cat([o[b] for o in outputs]) for b in teacher.blocks}
    for block, x in features.items():
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            key = sample.images.keys[records[int(bad.nonzero()[0])][0]]
            raise UserError(
                f"block {block} gives NaN or Inf for image {key!r}; run the teacher with cache.precision no and "
                "teacher.dtype float32"
            )
    return features


class Scale:
    """The size of the cache for each way to store the features.

    images: the number in the data set; features, calibration: of some records, by block; sizes: {file: bytes} of a
    small cache with `records` records, for everything but features; free: bytes of the disk, or None if not known.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        images: int,
        features: Mapping[int, Tensor],
        calibration: Mapping[int, Calibration],
        sizes: Mapping[str, int],
        records: int,
        free: int | None,
    ) -> None:
        self.config, self.backbone, self.images, self.free = config, backbone, images, free
        self._features, self._calibration = features, calibration
        self.tail_bytes = sizes.get(TAIL, 0)
        fixed = {n: size for n, size in sizes.items() if n.rpartition("/")[2] in _FIXED or n.startswith(f"{JOURNAL}/")}
        growing = {name: size for name, size in sizes.items() if name not in fixed}
        other = sum(size for name, size in growing.items() if not name.startswith((f"{FEATURES}/", f"{POSITIONS}/")))
        self._fixed, self._other = sum(fixed.values()), other / records

    def options(self, codec: str, shares: Sequence[float]) -> list[PlanOption]:
        """Return one option for every share of tokens.

        The result is empty if the features exceed the codec's range; for the configured codec, UserError is raised.
        """
        try:
            error = 0.0
            for block, x in self._features.items():
                with naming(block):
                    measured = fidelity(CODECS[codec], x, self._calibration[block])
                error = max(error, measured["clean"]["relative_error"])
            return [self.option(codec, share, error) for share in shares]
        except UserError:
            if codec == self.config.cache.codec:
                raise
            return []

    def option(self, codec: str, share: float, error: float) -> PlanOption:
        """Return the option of a codec that stores this share of the patch tokens; error: see PlanOption."""
        views, blocks = self.config.views.count, len(self._features)
        patches = next(iter(self._features.values())).shape[1] - self.backbone.prefix
        stored = max(1, round(share * patches))
        features = sum(self.block_bytes(codec, block, stored) for block in self._features)
        beside = self._other + (2 * stored + _INDEX_ENTRY if stored < patches else 0)

        def total(views: float, count: float) -> float:
            return self.images * views * (features * count / blocks + beside) + self._fixed

        whole, an_image = round(total(views, blocks)), round(views * features)
        if self.free is None:
            return PlanOption(codec, share, error, an_image, whole, None, None, None)
        room = _USABLE * self.free
        a_view = total(1, blocks) - self._fixed
        a_block = total(views, 1) - total(views, 0)
        return PlanOption(
            codec=codec,
            token_share=share,
            error=error,
            bytes_per_image=an_image,
            bytes=whole,
            fits=whole <= room,
            max_views=max(0, int((room - self._fixed) / a_view)),
            max_blocks=max(0, min(depth(self.backbone.model), int((room - total(views, 0)) / a_block))),
        )

    def block_bytes(self, codec: str, block: int, stored: int) -> float:
        """Return the stored bytes of one record's features at a block, if `stored` of its patches are kept."""
        x, prefix = self._features[block], self.backbone.prefix
        patches = x.shape[1] - prefix
        if stored < patches:
            generator = torch.Generator().manual_seed(0)
            drawn = [torch.randperm(patches, generator=generator)[:stored].sort().values for _ in range(len(x))]
            x = take_patches(x, prefix, torch.stack(drawn).to(x.device))
        size = 0.0
        for few in few_records(x):
            for values in CODECS[codec].encode(few, self._calibration[block]).values():
                on_host = values.to("cpu") if isinstance(values, Ragged) else values.cpu().numpy()
                pieces = pack_shard(on_host, len(few))
                size += sum(map(len, pieces)) - _END_OF_SHARD
        return size / len(x)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free
