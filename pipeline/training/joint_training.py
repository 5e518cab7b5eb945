"""What the paper trains with the student: fresh adapters, and what their losses need."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.config import RefineConfig
from pipeline.training.refiner_fit import RefinerFit
from singer.adapter_losses import RefinementBatch, adapter_losses
from singer.artifacts import BlockScale
from singer.refiner import Refiner
from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class JointTraining:
    """What the losses of adapters need when they are trained with the student, as in the paper.

    This is not a module, because all of it is frozen. prefix: the number of the teacher's prefix tokens; grids: as in
    RefinementBatch.
    """

    suffix: TeacherSuffix
    scales: dict[int, BlockScale]
    settings: RefineConfig
    prefix: int
    grids: Mapping[int, tuple[int, int] | None]

    @property
    def weights(self) -> dict[str, float]:
        """Return {name of a loss: its weight}."""
        return self.settings.loss_weights

    def losses(self, original: Mapping[int, Tensor], refined: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses of adapters, each as a mean over the blocks.

        original, refined: {block: (B, N, d)}.
        """
        s = self.settings
        batch = RefinementBatch(original, refined, self.suffix, self.scales, self.prefix, self.grids)
        found = adapter_losses(batch, list(refined), s.outlier_form, s.info_form, s.quantile, self.weights)
        return found.weighted


def new_joint(cache: Cache, settings: RefineConfig, device: torch.device) -> tuple[JointTraining, Refiner]:
    """Return what the losses of joint training need, and new adapters in their starting subspace."""
    settings = settings.model_copy(update={"cleaner": "adapter", "normaliser": "none"})
    fit = RefinerFit(cache, settings, np.arange(len(cache)), device)
    grids = {block: fit.refiner.cleaner(block).spec.grid for block in cache.blocks}
    assert fit.suffix is not None
    prefix = cache.manifest.teacher.prefix_tokens
    return JointTraining(fit.suffix, fit.scales, settings, prefix, grids), fit.refiner
