"""Stage 2: fit a refiner on the cached features, so that artifacts vanish and information stays.

`singer refine --cache CACHE --out ADAPTERS`. The teacher is not needed: its frozen tail lies in the cache.

Two-stage SiNGER: adapters start in the directions that the next reader sees least, and minimise
outlier_weight · L_outlier + info_weight · L_info + keep_weight · L_keep, L_info on clean-token Grams behind the next
block; there is no student yet. Blocks share no parameter and Adam scales each by itself, so that fitting them together
is fitting each alone.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.config import Config, RefineConfig
from pipeline.outputs import (
    Mode,
    check_output,
    claimed_output,
    read_as,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from pipeline.prefetch import prefetch
from pipeline.progress import meter
from pipeline.stores import Place
from singer.artifacts import clean_mask, norm_summary, patch_norms, robust_threshold
from singer.losses import info_loss, keep_loss, outlier_loss
from singer.refiner import CLEANERS, NORMALISERS, Adapter, Clip, Refiner, Standardize
from singer.subspaces import reader_weight, smallest_directions
from singer.tail import TeacherTail

STAGE = "refine"
REFINER = "refiner.safetensors"
MANIFEST = "refiner.json"
METRICS = "metrics.json"
LOG = "log.jsonl"
_LOG_EVERY = 10


@dataclass(frozen=True)
class BlockScale:
    """What is normal for the patch tokens of a block: median norm, and the threshold above which one is an artifact."""

    median: float
    threshold: float


@dataclass(frozen=True)
class RefinerManifest:
    """What a stored refiner is, and the id of the cache and the hash of the teacher that it was fitted to."""

    cache: str
    cleaner: str
    normaliser: str
    rank: Annotated[int, Field(ge=1)]
    scales: dict[int, BlockScale]
    teacher: str | None = None


@dataclass(frozen=True)
class RefineResult:
    """A fitted refiner and its figures on held-out records: {block: {"before", "after", drift ...}}."""

    adapters: Path
    cache: str
    cleaner: str
    normaliser: str
    seconds: float
    blocks: dict[int, dict[str, object]]


def refine(config: Config, cache_path: Place, out: Path, mode: Mode = "new") -> RefineResult:
    """Fit a refiner to the cache and store it at `out`. Raises ValueError for whatever the user can mend."""
    settings = config.refine
    _check_names(settings)
    cache = Cache(cache_path, settings.teacher, settings.blocks, settings.local_copy)
    check_output(out, mode, STAGE, config, [cache_path])
    train, held_out = split_records(cache, settings)
    if mode == "resume" and (out / MANIFEST).exists():
        load_refiner(out, cache)
        return _result(out)
    starts = start_directions(cache, settings) if settings.cleaner == "adapter" else {}
    with claimed_output(out, mode, STAGE, config, settings.seed):
        _fit(cache, settings, out, train, held_out, starts)
    return _result(out)


def _fit(
    cache: Cache,
    settings: RefineConfig,
    out: Path,
    train: np.ndarray,
    held_out: np.ndarray,
    starts: dict[int, Tensor],
) -> None:
    """Fit, measure and store; the manifest comes last."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sample = train[np.linspace(0, len(train) - 1, min(len(train), settings.statistics_records)).astype(int)]
    scales = measure_scales(cache, sample, settings.threshold_k)
    refiner = empty_refiner(cache, settings).to(device)
    if settings.cleaner == "adapter":
        fit_adapters(cache, refiner, starts, scales, train, settings, out / LOG, device)
    elif settings.cleaner == "clip":
        for block in cache.blocks:
            cleaner = refiner.cleaners[str(block)]
            assert isinstance(cleaner, Clip)
            cleaner.threshold.fill_(scales[block].threshold)
    refiner.requires_grad_(False)
    if not all(torch.isfinite(v).all() for v in refiner.parameters()):
        raise ValueError(f"the adapters diverged; lower refine.lr (it is {settings.lr})")
    if settings.normaliser == "standardize":
        fit_standardisation(cache, refiner, scales, sample, device)
    seconds = time.perf_counter() - start

    blocks = {b: measure_block(cache, refiner, b, scales[b], held_out, device) for b in cache.blocks}
    write_tensors(out / REFINER, refiner.state_dict())
    metrics = {"cache": cache.id, "seconds": seconds, "blocks": blocks, "held_out_records": len(held_out)}
    write_json(out / METRICS, metrics)
    # The manifest comes last: a refiner without one was interrupted.
    manifest = RefinerManifest(
        cache.id, settings.cleaner, settings.normaliser, settings.rank, scales, cache.manifest.teacher.weights
    )
    write_json(out / MANIFEST, asdict(manifest))


def start_directions(cache: Cache, settings: RefineConfig) -> dict[int, Tensor]:
    """{block: (d, rank)}: where the adapters start."""
    tail = cache.tail()
    return {b: smallest_directions(reader_weight(tail, b), settings.rank) for b in cache.blocks}


def empty_refiner(cache: Cache, settings: RefineConfig) -> Refiner:
    teacher = cache.manifest.teacher
    widths = dict.fromkeys(cache.blocks, teacher.width)
    return Refiner(widths, teacher.prefix_tokens, settings.cleaner, settings.normaliser, settings.rank)


def load_refiner(path: Path, cache: Cache) -> Refiner:
    """The refiner stored at `path`, frozen. Raises ValueError if it was fitted to another cache.

    A cache that has grown since is still the same: what was there has not changed.
    """
    manifest = read_refiner(path)
    if manifest.cache not in cache.ids:
        raise ValueError(
            f"{path} was fitted to cache {manifest.cache[:12]}, but {cache.place} is {cache.id[:12]}; "
            "run singer refine on this cache"
        )
    if not set(cache.blocks) <= set(manifest.scales):
        raise ValueError(f"{path} was fitted to blocks {[*manifest.scales]}, not to {[*cache.blocks]}")
    settings = RefineConfig(cleaner=manifest.cleaner, normaliser=manifest.normaliser, rank=manifest.rank)
    _check_names(settings)
    refiner = empty_refiner(cache, settings)
    try:
        state = read_tensors(path / REFINER)
        unused = tuple(f".{b}." for b in manifest.scales if b not in cache.blocks)
        refiner.load_state_dict({n: t for n, t in state.items() if not any(u in n for u in unused)})
    except RuntimeError as error:
        raise ValueError(f"{path / REFINER} is damaged: {str(error).splitlines()[0]}") from None
    return refiner.requires_grad_(False)


def read_refiner(path: Path) -> RefinerManifest:
    """Raises ValueError if there is no finished refiner at `path`."""
    return read_as(path / MANIFEST, RefinerManifest, "finished refiner")


def split_records(cache: Cache, settings: RefineConfig) -> tuple[np.ndarray, np.ndarray]:
    """(records to fit on, held-out records): a random split, a pure function of the seed."""
    order = np.random.default_rng([settings.seed, 0]).permutation(len(cache))
    held_out = max(1, round(settings.holdout * len(cache)))
    if len(cache) - held_out < settings.batch_size:
        raise ValueError(
            f"{len(cache)} records are too few for refine.batch_size {settings.batch_size}; make it smaller"
        )
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def measure_scales(cache: Cache, records: np.ndarray, k: float) -> dict[int, BlockScale]:
    """Median norm and artifact threshold of every block, from the ORIGINAL features."""
    norms: dict[int, list[Tensor]] = {b: [] for b in cache.blocks}
    for features in _batches(cache, records):
        for block, x in features.items():
            norms[block].append(patch_norms(x, cache.manifest.teacher.prefix_tokens))
    return {
        b: BlockScale(median=float(torch.cat(n).median()), threshold=robust_threshold(torch.cat(n), k))
        for b, n in norms.items()
    }


def fit_adapters(
    cache: Cache,
    refiner: Refiner,
    starts: dict[int, Tensor],
    scales: dict[int, BlockScale],
    records: np.ndarray,
    settings: RefineConfig,
    log: Path,
    device: torch.device,
) -> None:
    """Minimise L_outlier, L_info and L_keep over the adapters of all blocks at once; they share no parameter."""
    tail = cache.tail().to(device)
    for block in cache.blocks:
        adapter = refiner.cleaners[str(block)]
        assert isinstance(adapter, Adapter)
        adapter.start(starts[block].to(device))
    optimiser = torch.optim.AdamW(refiner.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    order = batch_order(records, settings)
    weights = {"outlier": settings.outlier_weight, "info": settings.info_weight, "keep": settings.keep_weight}
    prefix = cache.manifest.teacher.prefix_tokens
    with meter("refine", settings.steps, "steps") as m, log.open("w") as file:
        for step, encoded in enumerate(prefetch(cache.read, order, 1, m)):
            features = cache.decode(encoded, device)
            losses: dict[str, float] = {}
            total = torch.zeros((), device=device)
            for block, x in features.items():
                parts = adapter_losses(refiner, tail, block, x, scales[block], prefix)
                for name, part in parts.items():
                    total = total + weights[name] * part
                    losses[f"{name}.{block}"] = float(part.detach())
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            optimiser.step()
            schedule.step()
            loss = float(total.detach())
            if step % _LOG_EVERY == 0 or step == settings.steps - 1:
                print(json.dumps({"step": step, "loss": loss, **losses}), file=file, flush=True)
            m.advance(1, f"loss {loss:.4f}")


def adapter_losses(
    refiner: Refiner, tail: TeacherTail, block: int, x: Tensor, scale: BlockScale, prefix: int
) -> dict[str, Tensor]:
    """L_outlier, L_info and L_keep of one block for its features x (B, N, d)."""
    clean = clean_mask(patch_norms(x, prefix), scale.threshold)
    refined = refiner.clean(x, block)
    outlier = outlier_loss(patch_norms(refined, prefix), scale.threshold, scale.median)
    with torch.no_grad():
        seen = tail.next_output(x, block)
    return {
        "outlier": outlier,
        "info": info_loss(tail.next_output(refined, block)[:, prefix:], seen[:, prefix:], clean),
        "keep": keep_loss(refined[:, prefix:], x[:, prefix:], clean),
    }


def fit_standardisation(
    cache: Cache, refiner: Refiner, scales: dict[int, BlockScale], records: np.ndarray, device: torch.device
) -> None:
    """Set the channel statistics of every block from refined tokens: patches that are no artifacts, and each prefix."""
    prefix = cache.manifest.teacher.prefix_tokens
    sums = {b: Moments(cache.manifest.teacher.width, prefix) for b in cache.blocks}
    for features in _batches(cache, records):
        for block, x in features.items():
            refined = refiner.clean(x.to(device), block).cpu()
            clean = clean_mask(patch_norms(x, prefix), scales[block].threshold)
            sums[block].add(refined[:, :prefix], refined[:, prefix:][clean])
    for block, moments in sums.items():
        normaliser = refiner.normalisers[str(block)]
        assert isinstance(normaliser, Standardize)
        moments.store(normaliser)


class Moments:
    """Running per-channel mean and deviation, in float64, of patch tokens and of each prefix position."""

    def __init__(self, d: int, prefix: int) -> None:
        self.patch = torch.zeros(3, d, dtype=torch.float64)
        self.prefix = torch.zeros(3, prefix, d, dtype=torch.float64)

    def add(self, prefix: Tensor, patches: Tensor) -> None:
        """prefix (B, P, d), patches (n, d)."""
        for sums, x in ((self.prefix, prefix.double()), (self.patch, patches.double())):
            sums += torch.stack([torch.ones_like(x).sum(0), x.sum(0), x.square().sum(0)])

    def variance(self) -> Tensor:
        """Of patch tokens, per channel, (d,) float64."""
        count = self.patch[0].clamp_min(1)
        return (self.patch[2] / count - (self.patch[1] / count).square()).clamp_min(0)

    def store(self, into: Standardize) -> None:
        for sums, mean, std in (
            (self.patch, into.mean, into.std),
            (self.prefix, into.prefix_mean, into.prefix_std),
        ):
            if not sums.numel():
                continue
            average = sums[1] / sums[0].clamp_min(1)
            deviation = (sums[2] / sums[0].clamp_min(1) - average.square()).clamp_min(0).sqrt()
            mean.copy_(average)
            # A channel that hardly varies carries rounding noise, which must not be blown up to unit variance.
            std.copy_(deviation.clamp_min(1e-2 * float(deviation.mean()) + 1e-12))


def measure_block(
    cache: Cache, refiner: Refiner, block: int, scale: BlockScale, records: np.ndarray, device: torch.device
) -> dict[str, object]:
    """Norms before and after cleaning, and how far clean and artifact tokens moved, on some records."""
    prefix = cache.manifest.teacher.prefix_tokens
    before, after = [], []
    drift = Moments(cache.manifest.teacher.width, 0)
    spread = Moments(cache.manifest.teacher.width, 0)
    for features in _batches(cache, records):
        x = features[block].to(device)
        refined = refiner.clean(x, block)
        norms = patch_norms(x, prefix)
        clean = clean_mask(norms, scale.threshold)
        before.append(norms)
        after.append(patch_norms(refined, prefix))
        drift.add(x[:, :0], (refined - x)[:, prefix:][clean])
        spread.add(x[:, :0], x[:, prefix:][clean])
    return {
        "threshold": scale.threshold,
        "before": norm_summary(torch.cat(before), scale.threshold),
        "after": norm_summary(torch.cat(after), scale.threshold),
        # Shares of the clean tokens' variance around their mean: a shift common to all tokens is no loss.
        "clean_drift_percent": 100 * float((drift.variance().sum() / spread.variance().sum()).sqrt()),
    }


def batch_order(records: np.ndarray, settings: RefineConfig) -> Iterator[np.ndarray]:
    """`steps` batches of records, epoch after epoch; a pure function of the seed."""
    step = 0
    for epoch in range(settings.steps):
        shuffled = np.random.default_rng([settings.seed, 1, epoch]).permutation(records)
        for start in range(0, len(shuffled) - settings.batch_size + 1, settings.batch_size):
            if step == settings.steps:
                return
            yield shuffled[start : start + settings.batch_size]
            step += 1


def _batches(cache: Cache, records: np.ndarray, size: int = 64) -> Iterator[dict[int, Tensor]]:
    parts = [records[i : i + size] for i in range(0, len(records), size)]
    for encoded in prefetch(cache.read, parts, 1):
        yield cache.decode(encoded, torch.device("cpu"))


def _check_names(settings: RefineConfig) -> None:
    for key, known in (("cleaner", CLEANERS), ("normaliser", NORMALISERS)):
        if getattr(settings, key) not in known:
            raise ValueError(f"refine.{key}: unknown {getattr(settings, key)!r}; known: {', '.join(known)}")


def _result(out: Path) -> RefineResult:
    manifest = read_as(out / MANIFEST, RefinerManifest, "finished refiner")
    metrics = read_json(out, METRICS, "finished refiner")
    try:
        blocks = {int(b): v for b, v in metrics["blocks"].items()}
        return RefineResult(out, manifest.cache, manifest.cleaner, manifest.normaliser, metrics["seconds"], blocks)
    except (KeyError, AttributeError, ValueError):
        raise ValueError(f"{out / METRICS} is damaged") from None
