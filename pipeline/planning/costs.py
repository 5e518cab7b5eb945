"""The arithmetic of a plan: rates with their spread, hours, break-even, bottlenecks.

A figure that was not measured is None.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STUDENTS = (1, 5, 20)
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


@dataclass(frozen=True)
class Work:
    """The amount of work: the cache's images, its views of each, and a student's epochs over all these views."""

    images: int
    views: int
    epochs: int

    @property
    def records(self) -> int:
        """Return the number of views that the teacher computes once, for the cache."""
        return self.images * self.views

    @property
    def samples(self) -> int:
        """Return the number of views that one student sees, as its teacher would online."""
        return self.records * self.epochs


@dataclass(frozen=True)
class StudentCost:
    """Hours until so many students are trained.

    online_hours: with the teacher in every step; cached_hours: from the cache, with the hours of caching.
    """

    students: int
    online_hours: float | None
    cached_hours: float | None


def caching_hours(work: Work, caching: Rate, setup_seconds: float | None) -> float | None:
    """Return the hours that caching all records takes; setup_seconds: the time before the first record."""
    if caching.per_second is None or setup_seconds is None:
        return None
    return (setup_seconds + work.records / caching.per_second) / 3600


def online_hours(work: Work, online: Rate) -> float | None:
    """Return the hours that one student takes with the teacher in every step."""
    return None if online.per_second is None else work.samples / online.per_second / 3600


def cached_hours(work: Work, cached: Rate, reading: Rate, in_memory: bool) -> float | None:
    """Return the hours that one student takes from the cache.

    cached: the rate of its steps with features in memory; reading: the rate at which features are read from the disk;
    in_memory: whether the whole cache stays in memory after the first epoch.
    """
    cold = slowest([cached, reading])
    if cached.per_second is None or cold.per_second is None:
        return None
    from_disk = 1 if in_memory else work.epochs
    return work.records * (from_disk / cold.per_second + (work.epochs - from_disk) / cached.per_second) / 3600


def student_costs(caching: float | None, cached: float | None, online: float | None) -> list[StudentCost]:
    """Return the hours of 1, 5 and 20 students; caching: hours of the cache; cached, online: hours of one student."""

    def from_cache(students: int) -> float | None:
        return None if caching is None or cached is None else caching + students * cached

    return [StudentCost(n, None if online is None else n * online, from_cache(n)) for n in STUDENTS]


def break_even(caching: float | None, cached: float | None, online: float | None) -> int | None:
    """Return the smallest number n of students that take no longer from the cache: caching + n cached <= n online.

    caching: hours of the cache; cached, online: hours of one student. The result is None if one of them was not
    measured, or if the cache never pays off.
    """
    if caching is None or cached is None or online is None or online <= cached:
        return None
    # The division rounds: 2.0000000001 students are 2.
    return max(1, math.ceil(caching / (online - cached) - 1e-9))


def break_even_text(caching: float | None, cached: float | None, online: float | None) -> str:
    """Return the break-even in words."""
    if caching is None or cached is None or online is None:
        return "not measured"
    students = break_even(caching, cached, online)
    if students is None:
        return "the cache never pays off: a step from it is no faster than one with the teacher online"
    return f"the cache pays off from student {students} on"
