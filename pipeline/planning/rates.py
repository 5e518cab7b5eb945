"""Rates: work a second, measured in three repeats, alone or beside other work; the slowest of several stages."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from pipeline.runtime.background import BackgroundWorker

REPEATS = 3
# As a share of the mean. If repeats differ by more, the rate is too uncertain to plan a purchase with.
MOST_SPREAD = 0.25
# If all stages together are below this share of the slowest one's rate, the cores that they share limit them.
_SHARED = 0.75


@dataclass(frozen=True)
class Rate:
    """A rate, measured in several repeats.

    per_second: None if it was not measured; `status` then gives the reason. spread: half of the range of the repeats,
    as a share of their mean; None if there were no repeats.
    """

    per_second: float | None
    spread: float | None
    status: str

    @classmethod
    def of(cls, repeats: Sequence[tuple[float, float]], status: str = "measured") -> "Rate":
        """Return the rate over repeats, each given as (count, seconds).

        The rate is not measured if there are fewer than two repeats or if their spread is too large.
        """
        if len(repeats) < 2:
            return not_measured("too few repeats")
        rates = [count / max(seconds, 1e-9) for count, seconds in repeats]
        mean = sum(count for count, _ in repeats) / max(sum(seconds for _, seconds in repeats), 1e-9)
        spread = (max(rates) - min(rates)) / 2 / mean
        if spread > MOST_SPREAD:
            why = f"repeats differ by ±{spread:.0%}; use more --seconds, or an idle machine"
            return Rate(None, spread, f"not measured: {why}")
        return cls(mean, spread, status)

    def scaled(self, factor: float) -> "Rate":
        """Return the rate in another unit: `factor` of the new unit make one of this rate's unit."""
        return self if self.per_second is None else Rate(self.per_second * factor, self.spread, self.status)


def not_measured(why: str) -> Rate:
    """Return a rate that was not measured, for the reason `why`."""
    return Rate(None, None, f"not measured: {why}")


def slowest(rates: Sequence[Rate]) -> Rate:
    """Return the rate of stages that overlap: the slowest stage's, or not measured if one was not measured."""
    missing = next((rate for rate in rates if rate.per_second is None), None)
    return missing or min(rates, key=lambda rate: rate.per_second or 0)


def bottleneck(stages: Mapping[str, Rate], together: Rate) -> str | None:
    """Return the name of the slowest stage, or None unless every stage and all of them together were measured.

    Each stage is measured alone. If all of them together are far slower than the slowest one, the bottleneck is the
    cores that they share.
    """
    rates = {name: rate.per_second for name, rate in stages.items() if rate.per_second is not None}
    if together.per_second is None or not rates or len(rates) < len(stages):
        return None
    name = min(rates, key=lambda n: rates[n])
    if together.per_second < _SHARED * rates[name]:
        return f"the cores that {' and '.join(rates)} share"
    return name


def rate_of(steps: Generator[int, None, None], seconds: float, device: torch.device | None = None) -> Rate:
    """Measure the records a second of an endless generator, which yields after each step how many records it did.

    The first step warms up and does not count. seconds: the time of all three repeats; device: the device to wait for
    after each repeat. The generator is closed in the end.
    """

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    repeats: list[tuple[float, float]] = []
    with closing(steps):
        next(steps)
        for _ in range(REPEATS):
            wait()
            start, done = time.perf_counter(), 0
            while done == 0 or time.perf_counter() - start < seconds / REPEATS:
                done += next(steps)
            wait()
            repeats.append((done, time.perf_counter() - start))
    return Rate.of(repeats)


def rate_beside(
    steps: Generator[int, None, None], busy: Callable[[], object], seconds: float, device: torch.device | None = None
) -> Rate:
    """Measure as rate_of does, in a second thread, while this thread calls `busy`."""
    found: list[Rate] = []
    finished = threading.Event()

    def run() -> None:
        try:
            found.append(rate_of(steps, seconds, device))
        finally:
            finished.set()

    with BackgroundWorker(run, "measure") as start:
        start()
        while not finished.is_set():
            busy()
    return found[0]
