"""Is a cache whole and true? `singer cache verify CACHE [--weights FILE] [--repair]`.

Every file is compared with its checksum and the index with the manifest; with the teacher at hand, its features are
computed anew for a random sample and compared with the stored ones. --repair computes again what is damaged.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, islice

from pipeline.cache.segments import mine, read_segments
from pipeline.cache.variants import check_held_once
from pipeline.cache.verify.files import check_segment, unreachable
from pipeline.cache.verify.findings import LiveCheck, SegmentReport, VerifyResult
from pipeline.cache.verify.live import check_live, load_extractors
from pipeline.cache.verify.repair import repair_segment
from pipeline.config import Config
from pipeline.storage import Place, open_store
from singer.errors import UserError

__all__ = ["LiveCheck", "SegmentReport", "VerifyResult", "verify"]


def verify(
    config: Config,
    place: Place,
    *,
    live: bool = False,
    shards: str | Sequence[str] | None = None,
    sample: int = 64,
    repair: bool = False,
) -> VerifyResult:
    """Check the cache at `place`, complete or not; with `live` or `repair`, load config.teacher for a sample too.

    A teacher is run as for each of its variants in the cache; teacher.name may name a single one.

    shards: where the images lie now, if they have moved; sample: records of each part. Nothing is written, nor a lock
    taken, except for `repair`. Raises UserError if a manifest cannot be read, two parts hold the same, the teacher is
    none of the cache's, or what `repair` needs is gone.
    """
    store = open_store(place)
    parts = read_segments(store)
    check_held_once(parts)
    if repair and parts[0].manifest.version == 2:
        raise UserError(f"{place} was written by format version 2 and cannot be repaired; make a new cache")
    extractors = load_extractors(config, parts) if live or repair else iter(())
    first = list(islice(extractors, 1))  # before hours of reading
    with store.lock() if repair else nullcontext():
        reports = {part.name: check_segment(part) for part in parts}
        reports[""].files |= unreachable(store, parts)
        for extract in chain(first, extractors):
            for part in mine(parts, extract.teacher):
                if repair:
                    repair_segment(part, parts, reports[part.name], extract, shards)
                reports[part.name].live = check_live(part, reports[part.name], extract, shards, sample)
    return VerifyResult(place, all(r.whole for r in reports.values()), list(reports.values()))
