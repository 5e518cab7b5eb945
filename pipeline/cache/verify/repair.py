"""What is damaged and can be computed, computed again."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from copy import copy

import numpy as np
import yaml

from pipeline.cache.completion import complete_segment
from pipeline.cache.extract import Extractor
from pipeline.cache.fill import fill
from pipeline.cache.format import COMPLETE, RECORDS, SKIPPED, TAIL, journal_file
from pipeline.cache.index import read_images
from pipeline.cache.segments import Segment
from pipeline.cache.verify.files import metadata, shard_defects, shard_files, within
from pipeline.cache.verify.findings import SegmentReport
from pipeline.cache.verify.live import check_images, computable
from pipeline.config import CacheConfig, Config
from pipeline.data import ImageFile, relocate
from pipeline.runtime.progress import say
from pipeline.storage import Store
from pipeline.storage.outputs import CONFIG, tensor_bytes
from singer.errors import UserError
from singer.suffix import suffix_state


def repair_segment(
    part: Segment,
    parts: Sequence[Segment],
    report: SegmentReport,
    extract: Extractor,
    shards: str | Sequence[str] | None,
) -> None:
    """Write again what is damaged or missing of a part and can be computed; the report is brought up to date."""
    manifest, store = part.manifest, part.store
    again = metadata(manifest)
    if within(part, TAIL) in report.files:
        again[TAIL] = tensor_bytes(suffix_state(extract.vit.model.state_dict(), manifest.tail_first_block))
    for name, content in again.items():
        if within(part, name) not in report.files:
            continue
        if hashlib.sha256(content).hexdigest() == manifest.files.get(name):
            store.write(name, content)
            del report.files[within(part, name)]
        else:
            say(f"{store.url}/{name} was written by other versions of libraries; restore it from a copy")

    wanted = sorted(report.missing + report.damaged)
    if not computable(part, report):
        return
    if wanted:
        compute_again(part, parts, wanted, report, extract, shards)
    ends = {within(part, name): name for name in (COMPLETE, RECORDS, SKIPPED)}
    unfinished = COMPLETE not in store.sizes() or any(place in report.files for place in ends)
    if unfinished and not (report.missing or report.damaged):
        for place, name in ends.items():
            store.remove(name)
            report.files.pop(place, None)
        complete_segment(part)


def compute_again(
    part: Segment,
    parts: Sequence[Segment],
    wanted: Sequence[int],
    report: SegmentReport,
    extract: Extractor,
    shards: str | Sequence[str] | None,
) -> None:
    """Compute some shards again and bring the report up to date."""
    manifest, store = part.manifest, part.store
    own = copy(extract)
    own.config = with_batch_size(extract.config, store)
    digests = None
    with suppress(UserError):  # of a part that was never completed, or whose index is damaged, they are not known
        digests = part.digests() if part.completion is not None else None
    if digests is not None:
        numbers = np.unique(
            np.concatenate([np.arange(*manifest.shard_range(s)) for s in wanted]) // manifest.views_each
        )
        with ImageFile(relocate(read_images(store), shards)) as files:
            check_images(files, numbers, digests)
    # First: a run that dies from here on leaves the part incomplete and the shard missing, not half new.
    store.remove(COMPLETE)
    for shard in wanted:
        store.remove(journal_file(shard))
    fill(part, wanted, own, parts, shards, digests)

    report.missing, report.damaged, sizes = [], [], store.sizes()
    for shard in wanted:
        for name in (journal_file(shard), *shard_files(manifest, shard)):
            report.files.pop(within(part, name), None)
        found = shard_defects(part, sizes, shard)
        if found == {}:
            report.repaired.append(shard)
        else:  # the disk itself fails
            report.damaged.append(shard)
            report.files |= {within(part, name): why for name, why in (found or {}).items()}


def with_batch_size(config: Config, store: Store) -> Config:
    """The configuration with the batches in which a part was computed: others change the last bits of features."""
    try:
        size = yaml.safe_load(store.read(CONFIG))["cache"]["batch_size"]
        known = CacheConfig.model_validate({**config.cache.model_dump(), "batch_size": size})
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return config
    return config.model_copy(update={"cache": known})
