"""Stage 2: fit a refiner on the cached features, so that artifacts vanish and information stays.

`singer refine --cache CACHE --out ADAPTERS`. The teacher is not needed: its frozen tail lies in the cache.

A refiner is a cleaner and a normaliser. Closed forms take a sample; adapters (SiNGER, in its two-stage form) start in a
subspace that the next reader hardly sees and minimise outlier_weight · L_outlier + info_weight · L_info +
keep_weight · L_keep; there is no student yet. The normaliser's statistics come from refined clean tokens, at the end.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import clean_moments, gather_evidence, measure_blocks, measure_scales, shape_of, spread
from pipeline.config import Config, RefineConfig
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.progress import say
from pipeline.runtime.ranks import Ranks, watched
from pipeline.storage import Place
from pipeline.storage.outputs import (
    INPUTS,
    Mode,
    check_output,
    claimed_output,
    process_log,
    read_as,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from pipeline.training.adapters import fit_adapters, groups, load_fitted
from singer.artifacts import BlockScale
from singer.cleaners import CLEANERS
from singer.errors import UserError
from singer.losses import COUPLED, INFO_FORMS, OUTLIER_FORMS
from singer.normalisers import NORMALISERS
from singer.refiner import Refiner
from singer.subspaces import BASES, best_rank
from singer.tail import TeacherTail

STAGE = "refine"
# What names one of several variants of a teacher.
OPTION = "--set refine.teacher={}"
REFINER = "refiner.safetensors"
MANIFEST = "refiner.json"
METRICS = "metrics.json"


@dataclass(frozen=True)
class RefinerManifest:
    """What a stored refiner is, and the id of the cache and the hash of the teacher that it was fitted to.

    variant: the teacher's; old refiners have None, and the id alone tells it. ranks: {block: rank of its adapter}; seed
    and holdout tell which records it was not fitted on.
    """

    cache: str
    cleaner: str
    normaliser: str
    ranks: dict[int, Annotated[int, Field(ge=1)]]
    scales: dict[int, BlockScale]
    teacher: str
    seed: int
    holdout: float
    variant: str | None = None


@dataclass(frozen=True)
class RefineResult:
    """A fitted refiner and its figures on held-out records, of which there were so many; of old ones it is not known.

    blocks: {block: {"before", "after", drift ...}}; max_over_median in it is the largest norm of all, over the median.
    """

    adapters: Path
    cache: str
    cleaner: str
    normaliser: str
    seconds: float
    held_out_records: int | None
    blocks: dict[int, dict[str, object]]


def refine(config: Config, cache_path: Place, out: Path, mode: Mode = "new") -> RefineResult:
    """Fit a refiner to the cache and store it at `out`. Raises UserError for whatever the user can mend."""
    settings = config.refine
    _check_names(settings)
    begun = None
    if mode == "resume" and (out / INPUTS).exists():
        begun = read_as(out / INPUTS, dict[str, str], "refiner").get("cache")
    cache = Cache(cache_path, settings.teacher, settings.blocks, settings.local_copy, begun, OPTION)
    check_output(out, mode, STAGE, config, [cache_path])
    split = split_records(cache, settings)
    if mode == "resume" and (out / MANIFEST).exists():
        load_refiner(out, cache)
        _forget_parts(out)
        return _result(out)
    if begun is not None and begun not in cache.ids:
        raise UserError(f"{out} cannot be continued: it was started on another cache; use that or --overwrite")
    accelerator = make_accelerator("no")
    start = time.perf_counter()
    main = accelerator.is_main_process
    with watched(accelerator, STAGE) as ranks:
        fit = Fit(cache, settings, split[0], accelerator.device)
        with claimed_output(out, mode, STAGE, config, settings.seed) if main else process_log(out):
            if main:
                write_json(out / INPUTS, {"cache": cache.id})
            ranks.wait()
            _fit(fit, out, ranks)
            if main:
                _store(fit, out, split[1], start)
    return _result(out)


class Fit:
    """A refiner in the making: what is known of the cache's blocks before anything is trained."""

    def __init__(self, cache: Cache, settings: RefineConfig, records: np.ndarray, device: torch.device) -> None:
        self.cache, self.settings, self.records, self.device = cache, settings, records, device
        self.statistics = spread(records, settings.statistics_records)
        self.scales = measure_scales(cache, self.statistics, settings.threshold_k)
        self.tail = cache.tail().to(device)
        self.starts, self.ranks = {}, dict.fromkeys(cache.blocks, 1)
        if CLEANERS[settings.cleaner].trained:
            if settings.info_form in COUPLED and len(cache.blocks) < 2:
                raise UserError(
                    f"refine.info_form {settings.info_form} needs an intermediate block beside the last; cache another"
                )
            self.starts = start_directions(cache, self.tail, self.scales, self.statistics, settings, device)
            self.ranks = {b: start.shape[1] for b, start in self.starts.items()}
        self.refiner = empty_refiner(cache, settings, self.ranks).to(device)

    def close(self) -> None:
        """Everything with a closed form, once the adapters are there: cleaners, then normalisers behind them."""
        cache, settings = self.cache, self.settings
        self.refiner.requires_grad_(False)
        looks = CLEANERS[settings.cleaner].looks
        sample = spread(self.statistics, settings.sample_records) if looks else self.statistics[:0]
        for block in cache.blocks:
            evidence = gather_evidence(cache, sample, block, self.scales[block], self.tail, self.device, settings.seed)
            self.refiner.cleaner(block).fit(evidence)
        moments = clean_moments(cache, self.refiner, self.scales, self.statistics, self.device)
        for block in cache.blocks:
            self.refiner.normaliser(block).fit(moments[block])


def start_directions(
    cache: Cache,
    tail: TeacherTail,
    scales: dict[int, BlockScale],
    records: np.ndarray,
    settings: RefineConfig,
    device: torch.device,
) -> dict[int, Tensor]:
    """{block: (d, rank)}: where the adapters start."""
    starts = {}
    for block in cache.blocks:
        sample = spread(records, settings.sample_records)
        evidence = gather_evidence(cache, sample, block, scales[block], tail, device, settings.seed)
        rank = settings.rank
        if rank == "auto":
            rank, curve = best_rank(evidence, settings.basis)
            removed, drift = curve[rank - 1]
            say(f"block {block}: rank {rank} takes {removed:.1%} of the artifact energy and {drift:.1%} of the drift")
        starts[block] = BASES[settings.basis](evidence, rank)
    return starts


def _fit(fit: Fit, out: Path, ranks: Ranks) -> None:
    """Train this process's share of the adapters; return when all processes have done theirs."""
    cache, settings = fit.cache, fit.settings
    if not fit.starts:
        return
    together = groups(cache.blocks, settings.info_form)
    for group in together[ranks.rank :: ranks.world]:
        part = Cache(cache.place, None, group, settings.local_copy, cache.id)
        fit_adapters(part, fit.refiner, fit.tail, fit.starts, fit.scales, fit.records, settings, group, out, fit.device)
    ranks.wait()
    if ranks.rank == 0:
        for group in together:
            load_fitted(fit.refiner, group, out)


def _store(fit: Fit, out: Path, held_out: np.ndarray, start: float) -> None:
    """Finish, measure and store; the manifest comes last: a refiner without one was interrupted."""
    cache, settings = fit.cache, fit.settings
    fit.close()
    seconds = time.perf_counter() - start
    sample = spread(held_out, settings.statistics_records)
    blocks = measure_blocks(cache, fit.refiner, fit.scales, sample, fit.device)
    write_tensors(out / REFINER, fit.refiner.state_dict())
    metrics = {"cache": cache.id, "seconds": seconds, "blocks": blocks, "held_out_records": len(sample)}
    write_json(out / METRICS, metrics)
    manifest = RefinerManifest(
        cache=cache.id,
        cleaner=settings.cleaner,
        normaliser=settings.normaliser,
        ranks=fit.ranks,
        scales=fit.scales,
        teacher=cache.manifest.teacher.weights,
        seed=settings.seed,
        holdout=settings.holdout,
        variant=cache.manifest.teacher.variant,
    )
    write_json(out / MANIFEST, asdict(manifest))
    _forget_parts(out)


def _forget_parts(out: Path) -> None:
    """What fits leave for those that go on."""
    for pattern in ("fitted-*", "checkpoint-*"):
        for file in out.glob(pattern):
            file.unlink()


def empty_refiner(cache: Cache, settings: RefineConfig, ranks: Mapping[int, int]) -> Refiner:
    shapes = {b: shape_of(cache, ranks[b], settings.softness) for b in cache.blocks}
    return Refiner(shapes, settings.cleaner, settings.normaliser)


def open_refined(
    path: Path, place: Place, teacher: str | None, blocks: Sequence[int] | None, local_copy: Path | None, option: str
) -> Cache:
    """The cache of a refiner: the variant and, unless others are asked for, the blocks that it was fitted to.

    The arguments after `path` are those of Cache. Raises UserError if the refiner was fitted to another cache.
    """
    manifest = read_refiner(path)
    try:
        return Cache(place, teacher, blocks or tuple(manifest.scales), local_copy, manifest.cache, option)
    except UserError:
        # That it lacks blocks is no remedy where it is another teacher's.
        check_belongs(path, manifest, Cache(place, teacher, None, local_copy, manifest.cache, option))
        raise


def check_belongs(path: Path, manifest: RefinerManifest, cache: Cache) -> None:
    """Raise UserError if the refiner at `path` was fitted to another cache.

    A cache that has grown since is still the same: what was there has not changed.
    """
    variant = cache.manifest.teacher.variant
    if manifest.variant not in (None, variant):
        raise UserError(
            f"{path} was fitted to features of {manifest.variant}, but those of {cache.place} are of {variant}; "
            f"fit one to them with singer refine --set refine.teacher={variant}"
        )
    if manifest.cache not in cache.ids:
        raise UserError(
            f"{path} was fitted to cache {manifest.cache[:12]}, but {cache.place} is {cache.id[:12]}; "
            "run singer refine on this cache"
        )


def load_refiner(path: Path, cache: Cache) -> Refiner:
    """The refiner stored at `path`, frozen. Raises UserError if it was fitted to another cache, or to other blocks."""
    manifest = read_refiner(path)
    check_belongs(path, manifest, cache)
    if not set(cache.blocks) <= set(manifest.scales):
        raise UserError(f"{path} was fitted to blocks {[*manifest.scales]}, not to {[*cache.blocks]}")
    settings = RefineConfig(cleaner=manifest.cleaner, normaliser=manifest.normaliser)
    _check_names(settings)
    try:
        refiner = empty_refiner(cache, settings, manifest.ranks)
        state = read_tensors(path / REFINER)
        unused = tuple(f".{b}." for b in manifest.scales if b not in cache.blocks)
        refiner.load_state_dict({n: t for n, t in state.items() if not any(u in n for u in unused)})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path / REFINER} is damaged: {str(error).splitlines()[0]}") from None
    return refiner.requires_grad_(False)


def read_refiner(path: Path) -> RefinerManifest:
    """Raises UserError if there is no finished refiner at `path`."""
    return read_as(path / MANIFEST, RefinerManifest, "finished refiner")


def split_records(cache: Cache, settings: RefineConfig) -> tuple[np.ndarray, np.ndarray]:
    """(records to fit on, held-out records): a random split, a pure function of the seed."""
    order = np.random.default_rng([settings.seed, 0]).permutation(len(cache))
    held_out = max(1, round(settings.holdout * len(cache)))
    if len(cache) == held_out:
        raise UserError(f"{cache.place} has {len(cache)} records: too few to fit on some and measure on others")
    if CLEANERS[settings.cleaner].trained and len(cache) - held_out < settings.batch_size:
        raise UserError(
            f"{len(cache)} records are too few for refine.batch_size {settings.batch_size}; make it smaller"
        )
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _check_names(settings: RefineConfig) -> None:
    known: dict[str, Iterable[str]] = {
        "cleaner": CLEANERS,
        "normaliser": NORMALISERS,
        "basis": BASES,
        "outlier_form": OUTLIER_FORMS,
        "info_form": INFO_FORMS,
    }
    for key, names in known.items():
        if getattr(settings, key) not in names:
            raise UserError(f"refine.{key}: unknown {getattr(settings, key)!r}; known: {', '.join(names)}")


def _result(out: Path) -> RefineResult:
    manifest = read_as(out / MANIFEST, RefinerManifest, "finished refiner")
    metrics = read_json(out, METRICS, "finished refiner")
    try:
        blocks = {int(b): v for b, v in metrics["blocks"].items()}
        seconds, held_out = metrics["seconds"], metrics.get("held_out_records")
        return RefineResult(out, manifest.cache, manifest.cleaner, manifest.normaliser, seconds, held_out, blocks)
    except (KeyError, AttributeError, ValueError):
        raise UserError(f"{out / METRICS} is damaged") from None
