"""The choice of codec, views and epochs that fit a disk and a time, with its reasons: arithmetic on measured costs."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config import Config
from pipeline.runtime.progress import duration
from singer.errors import UserError
from singer.sizes import ImageSize, Size

# From the most exact to the smallest.
LADDER = ("float16", "int8", "int4", "int3", "int2", "int1")
# At equal passes, more crops than these were no better (docs/results.md).
VIEWS = (5, 3, 2, 1)
# The paper trains for 100 passes over the images, and warms up for 5 of them.
PASSES, _WARMUP = 100, 0.05
# The shares of the free disk that the cache may fill if no size is given, and of the time that is planned.
_DISK, _TIME = 0.5, 0.9
# So many seconds are left for all that is not measured: starting, rehearsing, refining, the report and the export.
# Measured with a small teacher; a fit of adapters for a wide one takes longer, out of the time that is not planned.
_REST = 30.0
# Without a limit, so many hours are long enough to say how to set one.
_LONG = 12.0
# Fewer views are stored if caching takes more than this share of the time.
_CACHING = 0.5
# Passes over the images from which on crops teach a student more than the centre view (docs/results.md).
CROPS_FROM = 48
# The sizes of all crops that were measured, in shares of the image.
_SCALE = (0.3, 1.0)
# Small data sets get smaller batches, so that an epoch has so many steps.
_STEPS, _LEAST_BATCH = 16, 8
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Costs:
    """What was measured, for one process.

    decode: images a second that one thread reads and decodes; teacher, student: views a second, the student's with its
    backward pass; view_bytes: {codec: bytes of a view's features and pixels}; fixed_bytes: of the rest of a cache;
    gpu: whether threads decode while the models run; input_size: the student's; update: seconds of the optimiser in a
    step, which a small batch takes, too.
    """

    decode: float
    teacher: float
    student: float
    view_bytes: dict[str, float]
    fixed_bytes: int
    gpu: bool
    input_size: ImageSize
    update: float = 0.0

    def seconds(self, model: float, workers: int, decodes: bool = True) -> float:
        """Return the seconds of a view in a stage whose model does `model` views a second.

        decodes: whether the view is cut out of an image; reading a stored one takes hardly any time.
        """
        decode = 1 / self.decode if decodes else 0.0
        return max(1 / model, decode / workers) if self.gpu else 1 / model + decode


@dataclass(frozen=True)
class Choice:
    """A choice and its price: bytes of the cache, and hours of caching, training and probing.

    sets: {key: value} of the configuration; reasons: a sentence for each choice.
    """

    sets: dict[str, Any]
    reasons: list[str]
    bytes: int
    caching_hours: float
    training_hours: float
    probing_hours: float

    @property
    def hours(self) -> float:
        """Return all hours together."""
        return self.caching_hours + self.training_hours + self.probing_hours

    @property
    def forecast(self) -> str:
        """Return the price in words."""
        parts = {"teacher": self.caching_hours, "student": self.training_hours, "probes": self.probing_hours}
        seconds = {name: 3600 * value for name, value in parts.items()} | {"all else": _REST}
        each = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        return f"forecast: about {duration(sum(seconds.values()))} ({each}); the cache takes {self.bytes / 1e9:.3g} GB"


@dataclass(frozen=True)
class Chooser:
    """Chooses what the configuration does not give.

    images: that are cached; probed: that the probes see; free: bytes of the disk; hours, disk: what the user allows, in
    hours and bytes, or None; processes: how many share the work; spent: seconds that have gone before.
    """

    config: Config
    images: int
    probed: int
    costs: Costs
    free: int
    processes: int = 1
    hours: float | None = None
    disk: int | None = None
    spent: float = 0.0

    def choose(self) -> Choice:
        """Return the choice. Raises UserError if nothing fits."""
        views = self._views()
        epochs = self._epochs(views)
        caching, training = self._caching_hours(views), self._training_hours(views, max(1, epochs))
        self._check_time(views, epochs, caching + training + self._probing_hours)
        codec, stored = self._codec(views), self._pixel_bytes(views)
        sets = {"cache.codec": codec, **self._sets(views, epochs), **self._workers}
        reasons = self._reasons(views, epochs, codec, sets.get("distill.batch_size", self.config.distill.batch_size))
        if stored:
            sets |= {"views.pixels": "uint8", "views.pixel_size": self._pixel_size}
            reasons.append(
                f"stored views: {stored / 1e9:.3g} GB, as the student sees them; it decodes no images, and is the same"
            )
        elif self.config.views.pixels == "auto":
            sets["views.pixels"] = "none"
        if self.hours is None and caching + training > _LONG:
            reasons.append("time: no limit; for one, stop this and repeat the command with --hours H --resume")
        return Choice(sets, reasons, self._bytes(views, codec) + stored, caching, training, self._probing_hours)

    def _codec(self, views: int) -> str:
        return next(c for c in self._codecs if self._bytes(views, c) <= self._room)

    def _pixel_bytes(self, views: int) -> int:
        """Return the bytes of the views if they are stored, too: where that is left open, and they have room."""
        if self.config.views.pixels != "auto":
            return 0
        height, width = Size.of(self._pixel_size)
        stored = self.images * views * 3 * height * width
        return stored if self._bytes(views, self._codec(views)) + stored <= self._room else 0

    @property
    def _pixel_size(self) -> ImageSize:
        """Return the size of stored views: what is given, or the student's own."""
        return self.config.views.pixel_size or self.costs.input_size

    def _given(self, section: str, *keys: str) -> bool:
        return not set(keys).isdisjoint(getattr(self.config, section).model_fields_set)

    @property
    def _views_given(self) -> bool:
        centred = self._given("views", "kind", "crop") and self.config.views.kind == "center"
        return self._given("views", "count") or centred

    @property
    def _codecs(self) -> tuple[str, ...]:
        return (self.config.cache.codec,) if self._given("cache", "codec") else LADDER

    @cached_property
    def _room(self) -> int:
        """Return the bytes that the cache may take."""
        if self.disk is not None and self.disk > self.free:
            raise UserError(
                f"--disk-gb {self.disk / 1e9:g}: only {self.free / 1e9:.3g} GB are free there; free some, or give less"
            )
        return self.disk if self.disk is not None else int(_DISK * self.free)

    @cached_property
    def _workers(self) -> dict[str, int]:
        """Return {key: threads that decode}: what was given, or the cores of a process."""
        cores = max(2, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // self.processes))
        return {
            f"{name}.workers": getattr(self.config, name).workers if self._given(name, "workers") else cores
            for name in ("cache", "distill")
        }

    @property
    def _probing_hours(self) -> float:
        # Both models run on one process, without a backward pass, and the teacher without copies of the views.
        teacher = self.costs.teacher * self.config.teacher.copies
        return self.probed * (1 / teacher + 1 / (3 * self.costs.student) + 2 / self.costs.decode) / 3600

    def _caching_hours(self, views: int) -> float:
        seconds = self.costs.seconds(self.costs.teacher, self._workers["cache.workers"])
        return self.images * views * seconds / self.processes / 3600

    def _training_hours(self, views: int, epochs: int) -> float:
        decodes = self.config.views.pixels in ("auto", "none") and not self._pixel_bytes(views)
        seconds = self.costs.seconds(self.costs.student, self._workers["distill.workers"], decodes)
        steps = -(-self.images * views // self._batch(views))
        return epochs * (self.images * views * seconds / self.processes + steps * self.costs.update) / 3600

    def _batch(self, views: int) -> int:
        """Return the records in a batch: what is given, or fewer for a small data set."""
        given = self.config.distill.batch_size
        small = max(_LEAST_BATCH, min(given, self.images * views // _STEPS))
        return given if self._given("distill", "batch_size") else small

    def _bytes(self, views: int, codec: str) -> int:
        return round(self.images * views * self.costs.view_bytes[codec]) + self.costs.fixed_bytes

    def _views(self) -> int:
        """Return the most views for which disk and time are enough. Raises UserError if the disk is too small."""
        counts, smallest = (self.config.views.count,) if self._views_given else VIEWS, self._codecs[-1]
        fitting = [n for n in counts if self._bytes(n, smallest) <= self._room]
        if not fitting:
            need = self._bytes(counts[-1], smallest) / 1e9
            more = 1.05 * need
            remedy = f"give --disk-gb {more:.2g} or more" if 1e9 * more < self.free else f"make room for {more:.2g} GB"
            raise UserError(
                f"the cache takes {need:.3g} GB even with views.count {counts[-1]} and codec {smallest}, and "
                f"{self._room / 1e9:.3g} GB are allowed; {remedy}, or give fewer images"
            )
        return next((n for n in fitting if self._quick(n)), fitting[-1])

    def _quick(self, views: int) -> bool:
        """Return whether the time is enough for these views, and for so many passes that they pay."""
        epochs = self._epochs(views)
        pay = self._views_given or views == 1 or views * epochs >= CROPS_FROM
        if self.hours is None:
            return pay
        caching = self._caching_hours(views)
        hours = caching + self._training_hours(views, epochs) + self._probing_hours
        return pay and caching <= _CACHING * self._time and hours <= self._left

    def _epochs(self, views: int) -> int:
        """Return how many epochs fit, which may be none."""
        if self._given("distill", "epochs"):
            return self.config.distill.epochs
        most = max(1, PASSES // views)
        if self.hours is None:
            return most
        left = self._time - self._probing_hours - self._caching_hours(views)
        return max(0, min(most, int(left / self._training_hours(views, 1))))

    @property
    def _left(self) -> float:
        """Return the hours that are left for what was measured."""
        return (self.hours or 0.0) - (self.spent + _REST) / 3600

    @property
    def _time(self) -> float:
        """Return the hours that are planned; a forecast may be a little wrong."""
        return _TIME * self._left

    def _check_time(self, views: int, epochs: int, hours: float) -> None:
        if self.hours is not None and (epochs < 1 or hours > self._left):
            seconds = 3600 * hours + self.spent + _REST
            need = 1.05 * (hours / _TIME + (self.spent + _REST) / 3600)
            raise UserError(
                f"{self.images} images take about {duration(seconds)} with views.count {views} and distill.epochs "
                f"{max(1, epochs)}, more than --hours {self.hours:g}; give --hours {need:.2g} or more, fewer images or "
                "smaller models"
            )

    def _sets(self, views: int, epochs: int) -> dict[str, Any]:
        """Return the keys that belong to so many views and epochs."""
        sets = {"views.count": views, "distill.epochs": epochs}
        warmup = round(_WARMUP * epochs, 4)
        chosen: dict[str, Any] = {"distill.batch_size": self._batch(views), "distill.warmup_epochs": warmup}
        if views > 1:
            chosen |= {"views.kind": "random-resized-crop", "views.scale": _SCALE, "views.flip": 0.5}
        return sets | {key: value for key, value in chosen.items() if not self._given(*key.split("."))}

    def _why_views(self, views: int) -> str:
        if self._views_given:
            return "given"
        if views == VIEWS[0]:
            return "random crops, as in the paper"
        more = VIEWS[VIEWS.index(views) - 1]
        if self._bytes(more, self._codecs[-1]) > self._room:
            return f"{more} do not fit {self._room / 1e9:.3g} GB"
        passes = more * self._epochs(more)
        if 0 < passes < CROPS_FROM:
            return f"with {more} there are {passes} passes over the images, and crops pay from {CROPS_FROM} on"
        return f"the time is too short for {more}"

    def _reasons(self, views: int, epochs: int, codec: str, batch: int) -> list[str]:
        limit = "all that the time allows" if epochs < PASSES // views else f"{epochs * views} passes over the images"
        exact = "exact, and it" if codec == LADDER[0] else "the most exact one that"
        costs = self.costs
        return [
            f"speed: teacher {costs.teacher:.3g} views/s, student {costs.student:.3g} views/s and "
            f"{1000 * costs.update:.3g} ms a step, decoding {costs.decode:.3g} images/s a thread, processes "
            f"{self.processes}",
            f"views {views}: {self._why_views(views)}",
            f"codec {codec}: {'given' if self._given('cache', 'codec') else exact + f' fits {self._room / 1e9:.3g} GB'}"
            f"; a view takes {costs.view_bytes[codec] / 1e3:.3g} kB",
            f"epochs {epochs}: {'given' if self._given('distill', 'epochs') else limit}",
            f"batches of {batch}: "
            + ("given" if self._given("distill", "batch_size") else f"an epoch has {-(-self.images * views // batch)}"),
        ]
