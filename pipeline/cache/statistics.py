"""Measure features of a cache: norms of blocks, samples of tokens, channel moments, and what refining changed."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.runtime.prefetch import prefetch
from pipeline.storage import Place
from singer.artifacts import BlockScale, block_scale, clean_mask, norm_summary, patch_norms
from singer.cleaners import BlockSpec
from singer.fit_context import FitContext
from singer.normalisers import Moments
from singer.refiner import Refiner
from singer.suffix import TeacherSuffix

_BATCH = 64


def batches(cache: Cache, records: np.ndarray, device: torch.device) -> Iterator[dict[int, Tensor]]:
    """Yield the features of some records, {block: (n, N, d)}, one batch at a time."""
    parts = [records[i : i + _BATCH] for i in range(0, len(records), _BATCH)]
    for encoded in prefetch(cache.read, parts, 1):
        yield cache.decode(encoded, device)


def last_block(place: Place, variant: str | None) -> Cache:
    """Open a cache for the last cached block of a teacher only."""
    return Cache(place, variant, [Cache(place, variant).blocks[-1]])


def first_views(cache: Cache) -> np.ndarray:
    """Return the record of the first view of every image, in the order of the images."""
    first: np.ndarray = np.unique(cache.index.image, return_index=True)[1]
    return first


def evenly_spaced(records: np.ndarray, count: int) -> np.ndarray:
    """Choose at most `count` of the records, evenly spread over them."""
    chosen: np.ndarray = records[np.linspace(0, len(records) - 1, min(len(records), count)).astype(int)]
    return chosen


def spec_of(cache: Cache, block: int, rank: int = 1, softness: float = 1.0) -> BlockSpec:
    """Return what cleaners and normalisers need to know of a block's cached features."""
    teacher = cache.manifest.teacher
    grid = None if cache.manifest.sampled else teacher.grid_of(block)
    return BlockSpec(teacher.width_of(block), teacher.prefix_tokens, grid, rank, softness)


def measure_scales(cache: Cache, records: np.ndarray, k: float, device: torch.device) -> dict[int, BlockScale]:
    """Measure the median norm and the artifact threshold of every block on the ORIGINAL features."""
    norms: dict[int, list[Tensor]] = {b: [] for b in cache.blocks}
    for features in batches(cache, records, device):
        for block, x in features.items():
            norms[block].append(patch_norms(x, cache.manifest.teacher.prefix_tokens).cpu())
    return {b: block_scale(torch.cat(n), k) for b, n in norms.items()}


def gather_context(
    cache: Cache,
    records: np.ndarray,
    block: int,
    scale: BlockScale,
    suffix: TeacherSuffix | None,
    device: torch.device,
    seed: int,
) -> FitContext:
    """Gather what a cleaner of one block is fitted to: the tokens of some records (or of none), held in memory."""
    spec = spec_of(cache, block)
    none = torch.empty(0, cache.manifest.tokens_of(block), spec.width, device=device)
    tokens = torch.cat([none, *(features[block] for features in batches(cache, records, device))])
    return FitContext(suffix, block, tokens, scale, spec.prefix, spec.grid, seed)


def clean_moments(
    cache: Cache, refiner: Refiner, scales: dict[int, BlockScale], records: np.ndarray, device: torch.device
) -> dict[int, Moments]:
    """Measure the moments of refined tokens, {block: moments}, of clean patch tokens and of each prefix position.

    The tokens are prepared as the block's normaliser needs them. A patch is clean if it was not an artifact
    before refining.
    """
    prefix = cache.manifest.teacher.prefix_tokens
    moments = {b: Moments(spec_of(cache, b), refiner.normaliser(b).needs_covariance) for b in cache.blocks}
    for features in batches(cache, records, device):
        for block, x in features.items():
            refined = refiner.normaliser(block).prepare(refiner.clean(x, block))
            clean = clean_mask(patch_norms(x, prefix), scales[block].threshold)
            moments[block].add(refined[:, :prefix], refined[:, prefix:][clean])
    return moments


def measure_blocks(
    cache: Cache, refiner: Refiner, scales: dict[int, BlockScale], records: np.ndarray, device: torch.device
) -> dict[int, dict[str, object]]:
    """Return {block: norms before and after cleaning, and how far clean tokens moved}, measured on some records."""
    prefix = cache.manifest.teacher.prefix_tokens
    found = {b: _Measured() for b in cache.blocks}
    for features in batches(cache, records, device):
        for block, x in features.items():
            measured, refined = found[block], refiner.clean(x, block)
            clean = clean_mask(patch_norms(x, prefix), scales[block].threshold)
            measured.before.append(patch_norms(x, prefix).cpu())
            measured.after.append(patch_norms(refined, prefix).cpu())
            measured.change.add((refined - x)[:, prefix:][clean])
            measured.tokens.add(x[:, prefix:][clean])
    return {block: measured.figures(scales[block].threshold) for block, measured in found.items()}


class _Measured:
    """Measurements of one block: norms, batch by batch, and the spread of clean tokens and of their change."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.change, self.tokens = RunningVariance(), RunningVariance()

    def figures(self, threshold: float) -> dict[str, object]:
        """Return the summary of all batches."""
        return {
            "threshold": threshold,
            "before": norm_summary(torch.cat(self.before), threshold),
            "after": norm_summary(torch.cat(self.after), threshold),
            # This is relative to the spread of clean tokens around their mean. A shift common to all tokens does not
            # count, because it loses nothing.
            "clean_drift_percent": 100 * (self.change.variance() / max(self.tokens.variance(), 1e-30)) ** 0.5,
        }


class RunningVariance:
    """The variance of vectors around their mean, in float64, as they come."""

    def __init__(self) -> None:
        self._count, self._squares = 0, 0.0
        self._sum: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add vectors x (n, d)."""
        x = x.double()
        self._count += len(x)
        self._sum = self._sum + x.sum(0)
        self._squares += float(x.square().sum())

    def variance(self) -> float:
        """Return the variance, summed over the channels."""
        mean = torch.as_tensor(self._sum) / max(1, self._count)
        return max(0.0, self._squares / max(1, self._count) - float(mean.square().sum()))
