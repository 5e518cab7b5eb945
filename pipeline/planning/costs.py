"""The arithmetic of a plan: rates with their spread, hours, break-even, bottlenecks. A figure is measured or None."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STUDENTS = (1, 5, 20)
# Of the mean: repeats that differ by more say nothing that money can be spent on.
MOST_SPREAD = 0.25
# A pipeline below this share of its slowest stage is held up by what the stages share: the cores.
_SHARED = 0.75


@dataclass(frozen=True)
class Rate:
    """How many a second, over repeats. per_second: None if it was not measured, for the reason in `status`.

    spread: half of the range of the repeats, as a share of their mean; None if there were none.
    """

    per_second: float | None
    spread: float | None
    status: str

    @classmethod
    def of(cls, repeats: Sequence[tuple[float, float]], status: str = "measured") -> "Rate":
        """Of (count, seconds) of each repeat. Too large a spread, or a single repeat, is no measurement."""
        if len(repeats) < 2:
            return not_measured("too few repeats")
        rates = [count / max(seconds, 1e-9) for count, seconds in repeats]
        mean = sum(count for count, _ in repeats) / max(sum(seconds for _, seconds in repeats), 1e-9)
        spread = (max(rates) - min(rates)) / 2 / mean
        if spread > MOST_SPREAD:
            why = f"repeats differ by {spread:.0%} to both sides; use more --seconds, or an idle machine"
            return Rate(None, spread, f"not measured: {why}")
        return cls(mean, spread, status)

    def scaled(self, factor: float) -> "Rate":
        """The rate of something of which there are `factor` to one of these."""
        return self if self.per_second is None else Rate(self.per_second * factor, self.spread, self.status)


def not_measured(why: str) -> Rate:
    return Rate(None, None, f"not measured: {why}")


def slowest(rates: Sequence[Rate]) -> Rate:
    """What stages that overlap reach together; not measured if one of them was not."""
    missing = next((rate for rate in rates if rate.per_second is None), None)
    return missing or min(rates, key=lambda rate: rate.per_second or 0)


def bottleneck(stages: Mapping[str, Rate], together: Rate) -> str | None:
    """The name of the slowest stage; None unless all were measured, and the whole of them, too.

    Stages are measured one by one. If all of them together are far slower than the slowest, it is the cores that they
    share.
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
    """What is to be done. images, views: of the cache; epochs: passes of a student over all views of all images."""

    images: int
    views: int
    epochs: int

    @property
    def records(self) -> int:
        """The teacher's work for the cache, once."""
        return self.images * self.views

    @property
    def samples(self) -> int:
        """What one student sees, and what its teacher would see online."""
        return self.records * self.epochs


@dataclass(frozen=True)
class StudentCost:
    """Hours until so many students are trained: with the teacher in every step, or from the cache, caching included."""

    students: int
    online_hours: float | None
    cached_hours: float | None


def caching_hours(work: Work, caching: Rate, setup_seconds: float | None) -> float | None:
    """Of the cache of all records; setup_seconds: of what comes before the first record."""
    if caching.per_second is None or setup_seconds is None:
        return None
    return (setup_seconds + work.records / caching.per_second) / 3600


def online_hours(work: Work, online: Rate) -> float | None:
    """Of one student with the teacher in every step."""
    return None if online.per_second is None else work.samples / online.per_second / 3600


def cached_hours(work: Work, cached: Rate, reading: Rate, in_memory: bool) -> float | None:
    """Of one student from the cache. cached: at features in memory; reading: of features from the disk.

    in_memory: all of the cache stays there after the first epoch.
    """
    cold = slowest([cached, reading])
    if cached.per_second is None or cold.per_second is None:
        return None
    from_disk = 1 if in_memory else work.epochs
    return work.records * (from_disk / cold.per_second + (work.epochs - from_disk) / cached.per_second) / 3600


def student_costs(caching: float | None, cached: float | None, online: float | None) -> list[StudentCost]:
    """Hours of 1, 5 and 20 students. caching: hours of the cache; cached, online: of one student."""

    def from_cache(students: int) -> float | None:
        return None if caching is None or cached is None else caching + students * cached

    return [StudentCost(n, None if online is None else n * online, from_cache(n)) for n in STUDENTS]


def break_even(caching: float | None, cached: float | None, online: float | None) -> int | None:
    """The fewest students that take no longer from the cache, caching included: caching + n cached <= n online.

    None if something was not measured, or if the cache never pays off.
    """
    if caching is None or cached is None or online is None or online <= cached:
        return None
    # As divisions round, 2.0000000001 students are 2.
    return max(1, math.ceil(caching / (online - cached) - 1e-9))


def verdict(caching: float | None, cached: float | None, online: float | None) -> str:
    """What the break-even says, in words."""
    if caching is None or cached is None or online is None:
        return "not measured"
    students = break_even(caching, cached, online)
    if students is None:
        return "the cache never pays off: a step from it is no faster than one with the teacher online"
    return f"the cache pays off from student {students} on"
