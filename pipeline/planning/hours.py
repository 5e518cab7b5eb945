"""The arithmetic of a plan: hours and break-even. A figure that was not measured is None."""

import math
from dataclasses import dataclass

from pipeline.planning.rates import Rate, slowest

STUDENTS = (1, 5, 20)


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
