"""Stage 2: fit a refiner on the cached features, so that artifacts vanish and information stays.

Run it with `singer refine --cache CACHE --out REFINER`. The teacher is not needed: its frozen suffix is in the cache.

A refiner is a cleaner and a normaliser. Cleaners in closed form need only a sample of records. Adapters (SiNGER, in its
two-stage form) start in a subspace (refine.basis): by default the directions with most artifact energy, in the paper
those with little effect on the next block. They minimise the weighted sum of L_outlier, L_info, L_keep and L_expect;
there is no student yet. At the end, the normaliser's statistics are computed from refined clean tokens.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced, measure_blocks
from pipeline.checks import check_names
from pipeline.config import Config
from pipeline.outputs.folder import Mode, begun_inputs, check_output, claimed_output
from pipeline.outputs.provenance import INPUTS
from pipeline.outputs.resuming import FIT_CHECKPOINT, FITTED, REFINER_MANIFEST
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import own_settings, this_process
from pipeline.runtime.ranks import Ranks
from pipeline.runtime.watched_rank import watched
from pipeline.storage import Place
from pipeline.storage.json_files import read_as, read_json, write_json
from pipeline.storage.tensors import write_tensors
from pipeline.training.refining.adapter_fit import diverged, fit_adapters, groups, load_fitted
from pipeline.training.refining.refiner_fit import RefinerFit
from pipeline.training.refining.stored_refiners import (
    METRICS,
    OPTION,
    REFINER,
    RefinerManifest,
    load_refiner,
    split_records,
)
from singer.errors import UserError

STAGE = "refine"


@dataclass(frozen=True)
class RefineResult:
    """A fitted refiner and its figures on held-out records.

    held_out_records: their number; blocks: {block: {"before", "after", drift ...}}, where max_over_median is the
    largest norm of all tokens over the median.
    """

    refiner: Path
    cache: str
    cleaner: str
    normaliser: str
    seconds: float
    held_out_records: int
    blocks: dict[int, dict[str, object]]


@own_settings()
def refine(config: Config, cache_path: Place, out: Path, mode: Mode = "new") -> RefineResult:
    """Fit a refiner to the cache and store it at `out`.

    Raises UserError for mistakes that the user can fix.
    """
    settings = config.refine
    check_names(config, "refine")
    known_cache = (begun_inputs(out, mode, "refiner") or {}).get("cache")
    cache = Cache(cache_path, settings.teacher, settings.blocks, settings.local_copies, known_cache, OPTION)
    check_output(out, mode, STAGE, config, [cache_path])
    split = split_records(cache, settings)
    if mode == "resume" and (out / REFINER_MANIFEST).exists():
        load_refiner(out, cache)
        _remove_intermediate_files(out)
        return _result(out)
    if known_cache is not None and known_cache not in cache.ids:
        raise UserError(f"{out} cannot be continued: it was started on another cache; use that or --overwrite")
    process = this_process()
    start = time.perf_counter()
    with watched(process, STAGE) as ranks:
        main = ranks.is_first
        fit = RefinerFit(cache, settings, split[0], process.device)
        with claimed_output(out, mode, STAGE, config, settings.seed) if main else process_log(out):
            if main:
                write_json(out / INPUTS, {"cache": cache.id})
            ranks.wait()
            _fit(fit, out, ranks)
            if main:
                _store(fit, out, split[1], start)
    return _result(out)


def _fit(fit: RefinerFit, out: Path, ranks: Ranks) -> None:
    """Train this process's share of the adapters, and wait until all processes have trained theirs."""
    if not fit.trained:
        return
    together = groups(fit.cache.blocks, fit.settings.info_form)
    for group in together[ranks.rank :: ranks.world]:
        fit_adapters(fit, group, out)
    ranks.wait()
    if ranks.is_first:
        for group in together:
            load_fitted(fit.refiner, group, out)


def _store(fit: RefinerFit, out: Path, held_out: np.ndarray, start: float) -> None:
    """Finish the refiner, measure it and store it.

    The manifest is written last: a refiner without one was interrupted.
    """
    cache, settings = fit.cache, fit.settings
    fit.fit_closed_forms()
    seconds = time.perf_counter() - start
    sample = evenly_spaced(held_out, settings.statistics_records)
    blocks = measure_blocks(cache, fit.refiner, fit.scales, sample, fit.device)
    write_tensors(out / REFINER, fit.refiner.state_dict())
    metrics = {"cache": cache.id, "seconds": seconds, "blocks": blocks, "held_out_records": len(sample)}
    try:
        write_json(out / METRICS, metrics)
    except ValueError:  # JSON has no infinite numbers
        if not fit.trained:
            raise
        raise diverged(settings) from None
    manifest = RefinerManifest(
        cache=cache.id,
        cleaner=settings.cleaner,
        normaliser=settings.normaliser,
        ranks=fit.adapter_ranks,
        scales=fit.scales,
        teacher=cache.manifest.teacher.weights,
        seed=settings.seed,
        holdout=settings.holdout,
        variant=cache.manifest.teacher.variant,
    )
    write_json(out / REFINER_MANIFEST, asdict(manifest))
    _remove_intermediate_files(out)


def _remove_intermediate_files(out: Path) -> None:
    """Remove the files that only an interrupted fit needs, to be continued."""
    for start in (FITTED, FIT_CHECKPOINT):
        for file in out.glob(f"{start}*"):
            file.unlink()


def _result(out: Path) -> RefineResult:
    manifest = read_as(out / REFINER_MANIFEST, RefinerManifest, "finished refiner")
    metrics = read_json(out, METRICS, "finished refiner")
    try:
        blocks = {int(b): v for b, v in metrics["blocks"].items()}
        seconds, held_out = metrics["seconds"], metrics["held_out_records"]
        return RefineResult(out, manifest.cache, manifest.cleaner, manifest.normaliser, seconds, held_out, blocks)
    except (KeyError, AttributeError, ValueError):
        raise UserError(f"{out / METRICS} is damaged") from None
