"""The cost of a cache before it is made: `singer cache plan --teacher ... --images ... --out CACHE`.

The real stages run for some seconds on images from all over the shards, in a temporary folder on the disk where the
cache would be. Every codec is tried. A figure that was not measured is None, and no figure is estimated from it.
"""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.append import Addition
from pipeline.cache.batch_size import with_batch_size
from pipeline.cache.calibration import calibrate
from pipeline.cache.codecs import CODECS
from pipeline.cache.pixel_choice import with_pixels
from pipeline.checks import check_names
from pipeline.config import Config
from pipeline.data import ImageFile, Spec, list_images
from pipeline.planning.advice import advice
from pipeline.planning.cache_size import PlanOption, SizeEstimate
from pipeline.planning.hours import (
    StudentCost,
    Work,
    break_even,
    break_even_text,
    cached_hours,
    caching_hours,
    online_hours,
    student_costs,
)
from pipeline.planning.pilot import Pilot
from pipeline.planning.rates import Rate, bottleneck, slowest
from pipeline.planning.sample import Sample, draw_images, open_teacher, sample_features
from pipeline.planning.scratch import scratch
from pipeline.planning.speeds import Speeds, measure_speeds, no_speeds
from pipeline.runtime.devices import own_settings, this_process, with_precision
from pipeline.runtime.machine import memory_bytes
from pipeline.storage import Place, is_remote, open_store
from pipeline.storage.disk import free_bytes
from pipeline.teachers.placement import weight_bytes
from pipeline.teachers.teacher import load_teacher
from singer.backbones import count_parameters, depth, resolve_blocks

# The shares of the patch tokens that are tried.
_SHARES = (1.0, 0.5)


@dataclass(frozen=True)
class StageSpeed:
    """The measured speed of a stage.

    per_second: views; spread_percent: half of the range of the repeats, in percent of their mean; status: "measured",
    perhaps with an extent, or "not measured: " and the reason. In the second case per_second is None.
    """

    stage: str
    per_second: float | None
    spread_percent: float | None
    status: str

    @classmethod
    def of(cls, name: str, rate: Rate) -> "StageSpeed":
        """Return the speed of the stage of this name from its rate."""
        spread = None if rate.spread is None else 100 * rate.spread
        return cls(name, rate.per_second, spread, rate.status)


@dataclass(frozen=True)
class PlanResult:
    """The result of a plan. A figure that was not measured is None; `stages` gives the reason.

    teacher_parameters, teacher_bytes: the number of the teacher's parameters, and the memory that they take;
    batch_size: views in its forward pass, as found if cache.batch_size is auto; copies: its passes over each view,
    which its speed and all hours count;
    images_per_second: views that cache-teacher stores in a second; hours: the time that it takes for all views;
    caching_bottleneck, training_bottleneck: the slowest stage; students: hours until 1, 5 and 20 students are trained
    for `epochs` passes over all views, with the teacher in every step, or from the cache with caching included;
    break_even_students: the smallest number of students for which the cache takes no longer, which `break_even_text`
    gives in words; targets: the targets of the student that was measured; written_bytes: the bytes that were written to
    measure the disk; tail_bytes: the size of the teacher's suffix, which every option stores once; free_bytes: the free
    space where the cache would be; chosen: the option that is configured; best_fit: the best option that fits: with the
    most tokens, then with the smallest error; advice: which views and codec to store, in words.
    """

    images: int
    views: int
    teacher_parameters: int
    teacher_bytes: int
    batch_size: int
    copies: int
    blocks: tuple[int, ...]
    pixels: str
    epochs: int
    images_per_second: float | None
    hours: float | None
    caching_bottleneck: str | None
    training_bottleneck: str | None
    students: list[StudentCost]
    break_even_students: int | None
    break_even_text: str
    targets: str
    stages: list[StageSpeed]
    written_bytes: int
    tail_bytes: int
    free_bytes: int | None
    chosen: PlanOption
    best_fit: PlanOption | None
    options: list[PlanOption]
    advice: str | None


@own_settings()
def plan(config: Config, images: Spec, out: Place | None = None, seconds: float = 20.0) -> PlanResult:
    """Run the real stages for some seconds in a temporary place beside `out`, and return what a cache would cost.

    out: where the cache would be; without it, neither the disk nor the hours with a cache are measured. seconds: how
    long caching runs, and how long the disk is written to at most; each other stage runs for a quarter of it. With 0,
    only bytes are measured. Raises UserError for mistakes that the user can fix.
    """
    config = with_precision(config)
    check_names(config, "cache")
    listed = list_images(config, images)
    backbone = load_teacher(config.teacher)
    blocks = tuple(resolve_blocks(config.cache.blocks, depth(backbone.model)))
    device = this_process().device
    with ExitStack() as stack:
        place = stack.enter_context(scratch(out)) if out is not None else None
        local = Path(place) if place is not None and not is_remote(place) else None
        if local is not None:
            local.mkdir(exist_ok=True)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="singer-plan-", dir=local)))
        teacher = open_teacher(config, backbone, device)
        config = with_batch_size(config, teacher.empty_batch, device)
        config = with_pixels(config, Addition(blocks, listed, 0, config.views.count), teacher.teacher, out)
        drawn = draw_images(config, listed)
        sample = Sample(config, drawn, stack.enter_context(ImageFile(drawn)), backbone.image_size, device)
        features = sample_features(config, sample, teacher)
        calibration = {b: calibrate(x, backbone.prefix) for b, x in features.items()}
        pilot = Pilot(config, sample, work / "cache" if place is None or local else f"{place}/cache", work)
        free = free_bytes(Path(out)) if out is not None and local is not None else None
        estimate = SizeEstimate(
            config, backbone, len(listed), features, calibration, pilot.sizes(), pilot.first.records, free
        )
        uneven = len(set(backbone.layout)) > 1  # then all tokens are stored
        shares = [1.0] if uneven else sorted({*_SHARES, config.cache.token_share}, reverse=True)
        codecs = [c for c in CODECS if not c.endswith("-plain") or c == config.cache.codec]
        options = [option for codec in codecs for option in estimate.options(codec, shares)]
        chosen = next(o for o in options if (o.codec, o.token_share) == (config.cache.codec, config.cache.token_share))
        speeds = no_speeds("--seconds 0")
        if seconds > 0:
            store = open_store(place) if place is not None else None
            speeds = measure_speeds(listed, sample, teacher, calibration, pilot, store, free, chosen.bytes, seconds)
    fitting = [o for o in options if o.fits]
    return PlanResult(
        images=len(listed),
        views=config.views.count,
        teacher_parameters=count_parameters(backbone.model),
        teacher_bytes=weight_bytes(backbone.model),
        batch_size=config.cache.views_at_once,
        copies=config.teacher.copies,
        blocks=blocks,
        pixels=config.views.pixels,
        epochs=config.distill.epochs,
        **judge(Work(len(listed), config.views.count, config.distill.epochs), speeds, chosen.bytes),
        tail_bytes=estimate.tail_bytes,
        free_bytes=free,
        chosen=chosen,
        best_fit=min(fitting, key=lambda o: (-o.token_share, o.error), default=None),
        options=options,
        advice=advice(config.distill.epochs * config.views.count, options),
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
        "break_even_text": break_even_text(hours, cached, online),
        "targets": speeds.targets,
        "stages": [StageSpeed.of(name, rate) for name, rate in {**caching, **training}.items()],
        "written_bytes": speeds.written_bytes,
    }
