"""Check that a cache is complete and correct: `singer cache verify CACHE [--weights FILE] [--repair]`.

Every file is compared with its checksum, and the index with the manifest. If the teacher is given, it computes the
features of a random sample again, and they are compared with the stored ones. --repair computes damaged Zarr shards
again.
"""

from contextlib import nullcontext
from itertools import chain, islice

from pipeline.cache.segments import read_segments, segments_of
from pipeline.cache.variants import check_held_once
from pipeline.cache.verify.files import check_segment, unreachable
from pipeline.cache.verify.findings import LiveCheck, SegmentReport, VerifyResult
from pipeline.cache.verify.live import check_live, load_extractors
from pipeline.cache.verify.repair import repair_segment
from pipeline.config import Config
from pipeline.data import Spec
from pipeline.runtime.devices import own_settings
from pipeline.storage import Place, open_store

__all__ = ["LiveCheck", "SegmentReport", "VerifyResult", "verify"]


@own_settings()
def verify(
    config: Config,
    place: Place,
    *,
    live: bool = False,
    images: Spec | None = None,
    sample: int = 64,
    repair: bool = False,
) -> VerifyResult:
    """Check the cache at `place`, complete or not; with `live` or `repair`, run config.teacher on a sample, too.

    The teacher is run with the settings of each of its variants in the cache; teacher.name may name a single variant.

    images: where the images are, if they moved; sample: records of each segment. Only `repair` writes or takes a lock.
    Raises UserError if a manifest cannot be read, if two segments hold the same features, if the cache does not hold
    this teacher, or if `repair` lacks the images that it needs.
    """
    store = open_store(place)
    segments = read_segments(store)
    check_held_once(segments)
    extractors = load_extractors(config, segments) if live or repair else iter(())
    first = list(islice(extractors, 1))  # so that a wrong teacher is found before hours of reading
    with store.lock() if repair else nullcontext():
        reports = {segment.name: check_segment(segment) for segment in segments}
        reports[""].files |= unreachable(store, segments)
        for extract in chain(first, extractors):
            for segment in segments_of(segments, extract.teacher):
                if repair:
                    repair_segment(segment, segments, reports[segment.name], extract, images)
                reports[segment.name].live = check_live(segment, reports[segment.name], extract, images, sample)
    return VerifyResult(place, all(r.whole for r in reports.values()), list(reports.values()))
