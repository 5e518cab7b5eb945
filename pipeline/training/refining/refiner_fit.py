"""Start the adapters of a refiner, and fit what it has in closed form."""

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import clean_moments, evenly_spaced, gather_context, measure_scales
from pipeline.config import RefineConfig
from pipeline.runtime.progress import say
from pipeline.training.refining.stored_refiners import empty_refiner
from singer.adapter_losses import COUPLED
from singer.artifacts import BlockScale
from singer.cleaners import CLEANERS, Adapter
from singer.errors import UserError
from singer.subspaces import BASES, CURVED, best_rank
from singer.suffix import TeacherSuffix


class RefinerFit:
    """A refiner that is being fitted, and what is known about the cache's blocks before anything is trained.

    trained: whether it has adapters, which are then in their starting subspace; records: those to fit to; suffix: what
    the losses read with, None if its blocks cannot read the stored tokens.
    """

    def __init__(self, cache: Cache, settings: RefineConfig, records: np.ndarray, device: torch.device) -> None:
        self.cache, self.settings, self.records, self.device = cache, settings, records, device
        self.statistics = evenly_spaced(records, settings.statistics_records)
        self.scales = measure_scales(cache, self.statistics, settings.threshold_k, device)
        self.trained = CLEANERS[settings.cleaner].trained
        needed = CLEANERS[settings.cleaner].needs_suffix or cache.has_suffix
        self._whole = cache.suffix().to(device) if needed else None
        self.suffix = runnable(self._whole, cache, settings)
        starts = {}
        if self.trained:
            if settings.info_form in COUPLED and len(cache.blocks) < 2:
                raise UserError(
                    f"refine.info_form {settings.info_form} needs an intermediate block besides the last one; "
                    "cache another block"
                )
            starts = start_directions(cache, self._whole, self.scales, self.statistics, settings, device)
        self.adapter_ranks = {b: starts[b].shape[1] if starts else 1 for b in cache.blocks}
        self.refiner = empty_refiner(cache, settings, self.adapter_ranks).to(device)
        for block, directions in starts.items():
            adapter = self.refiner.cleaner(block)
            assert isinstance(adapter, Adapter)
            adapter.start(directions, self.scales[block], settings.start == "doubled")

    def fit_closed_forms(self) -> None:
        """Fit everything that has a closed form, once the adapters are there: cleaners, then normalisers after them."""
        cache, settings = self.cache, self.settings
        self.refiner.requires_grad_(False)
        needs_tokens = CLEANERS[settings.cleaner].needs_tokens
        sample = evenly_spaced(self.statistics, settings.sample_records) if needs_tokens else self.statistics[:0]
        for block in cache.blocks:
            context = gather_context(cache, sample, block, self.scales[block], self._whole, self.device, settings.seed)
            self.refiner.cleaner(block).fit(context)
        moments = clean_moments(cache, self.refiner, self.scales, self.statistics, self.device)
        for block in cache.blocks:
            self.refiner.normaliser(block).fit(moments[block])


def runnable(suffix: TeacherSuffix | None, cache: Cache, settings: RefineConfig) -> TeacherSuffix | None:
    """Return a suffix if its blocks can read the stored tokens, else None.

    Blocks with rotary or relative positions cannot read a share of the patches. Raises UserError if the fit has to.
    """
    if suffix is None or not cache.manifest.sampled:
        return suffix
    device = next(suffix.parameters()).device
    try:
        for block in cache.blocks:
            shape = (1, cache.manifest.tokens_of(block), cache.manifest.teacher.width_of(block))
            suffix.last_output(torch.zeros(shape, device=device), block)
    except (RuntimeError, AssertionError):
        cleaner = CLEANERS[settings.cleaner]
        why = f"the teacher's next blocks need all patches, and {cache.place} holds some (cache.token_share)"
        if cleaner.needs_suffix or cleaner.needs_tokens:
            raise UserError(
                f"refine.cleaner {settings.cleaner}: {why}; use gated-adapter or neighbour, and not distill.joint"
            ) from None
        if cleaner.trained and (settings.rank == "auto" or settings.basis in CURVED):
            raise UserError(
                f"refine.basis and rank: {why}; use basis weights or artifact, and a number as rank"
            ) from None
        say(f"{why}: the fit does without them")
        return None
    return suffix


def start_directions(
    cache: Cache,
    suffix: TeacherSuffix | None,
    scales: dict[int, BlockScale],
    records: np.ndarray,
    settings: RefineConfig,
    device: torch.device,
) -> dict[int, Tensor]:
    """Return the directions where the adapters start, {block: (d, rank)}."""
    starts = {}
    for block in cache.blocks:
        sample = evenly_spaced(records, settings.sample_records)
        context = gather_context(cache, sample, block, scales[block], suffix, device, settings.seed)
        rank = settings.rank
        if rank == "auto":
            rank, curve = best_rank(context, settings.basis)
            removed, drift = curve[rank - 1]
            say(f"block {block}: rank {rank} removes {removed:.1%} of the artifact energy at {drift:.1%} of the drift")
        starts[block] = BASES[settings.basis](context, rank)
    return starts
