"""Hold what was found in a cache, and say what to do about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cache.format import CALIBRATION, COMPLETE, FIDELITY, IMAGES, RECORDS, SKIPPED, TAIL
from pipeline.outputs.provenance import PROVENANCE
from pipeline.outputs.resuming import CACHE_MANIFEST, CONFIG
from pipeline.storage import Place
from singer.errors import UserError

UNKNOWN = "unknown"


@dataclass(frozen=True)
class LiveCheck:
    """A comparison of stored and live features on a sample of records.

    gate: a record fails if the mean cosine of its tokens is below this; below: how many records fail; worst: the lowest
    mean cosine; worst_key, worst_block: its image and block; blocks: {block: relative error and cosine of prefix, clean
    and artifact tokens}.
    """

    records: int
    gate: float
    below: int
    worst: float
    worst_key: str
    worst_block: int
    blocks: dict[int, Any]


@dataclass
class SegmentReport:
    """What was found in a segment. part: its folder, "." for the first segment.

    missing: Zarr shards that were never finished; damaged: those with a wrong or missing file; repaired: those that
    were missing or damaged and were computed again; files: {place within the cache: what is wrong with it}.
    """

    part: str
    teacher: str
    records: int
    zarr_shards: int
    checked_files: int = 0
    checked_bytes: int = 0
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    live: LiveCheck | None = None

    @property
    def whole(self) -> bool:
        """Return whether nothing is missing or damaged, and no record failed the live check."""
        return not (self.missing or self.damaged or self.files or (self.live and self.live.below))


@dataclass(frozen=True)
class VerifyResult:
    """The result of verifying a cache. parts: the reports of its segments.

    whole: nothing is missing, all files are as they were written and, if the teacher was given, it computes the same
    features.
    """

    cache: Place
    whole: bool
    parts: list[SegmentReport]

    def check(self) -> None:
        """Raise UserError saying what to do if the cache is not whole."""
        problems: dict[str, list[str]] = {}
        for problem, remedy in _problems(self):
            problems.setdefault(remedy, []).append(problem)
        if problems:
            raise UserError(". ".join(f"{_some(found, 3)}; {remedy}" for remedy, found in problems.items()))


def _problems(result: VerifyResult) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do about it)."""
    place = result.cache
    repair = f"repair with singer cache verify {place} --repair --weights FILE"
    for r in result.parts:
        here = str(place) if r.part == "." else f"{place}/{r.part}"
        if r.live and r.live.below:
            problem = (
                f"{r.live.below} of {r.live.records} records of {here} are not what {r.teacher} computes now: image "
                f"{r.live.worst_key!r} has cosine {r.live.worst:.4f} at block {r.live.worst_block}, not {r.live.gate}"
            )
            yield problem, "make the cache anew"
        bad = sorted(r.missing + r.damaged)
        if bad:
            yield f"{len(bad)} of {r.zarr_shards} Zarr shards of {here} are damaged or missing: {_some(bad)}", repair
        for name, why in r.files.items():
            file = name.rpartition("/")[2]
            if why == UNKNOWN:
                yield f"{place}/{name} belongs to no segment of the cache", "remove it"
            elif file == CACHE_MANIFEST and why == "missing":
                yield f"{place}/{name} is missing", "repeat the cache-teacher command with --append"
            elif file in (CACHE_MANIFEST, IMAGES, CALIBRATION, FIDELITY, PROVENANCE, CONFIG):
                remedy = "this cannot be computed again: restore it from a copy or make the cache anew"
                yield f"{place}/{name} is {why}", remedy
            elif file in (TAIL, "zarr.json", COMPLETE, RECORDS, SKIPPED):
                yield f"{place}/{name} is {why}", repair


def _some(items: Sequence[object], most: int = 10) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
