"""What the paper trains with the student: fresh adapters, and what their losses need."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.config import RefineConfig
from pipeline.training.batch import Batch
from pipeline.training.refining.refiner_fit import RefinerFit
from singer.adapter_losses import RefinementBatch, adapter_losses
from singer.artifacts import BlockScale
from singer.refiner import Refiner
from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class JointTraining:
    """Adapters that are trained with the student, as in the paper, and what their losses need.

    This is not a module, because all but the adapters is frozen. prefix: the number of the teacher's prefix tokens;
    grids: as in RefinementBatch.
    """

    adapters: Refiner
    suffix: TeacherSuffix
    scales: dict[int, BlockScale]
    settings: RefineConfig
    prefix: int
    grids: Mapping[int, tuple[int, int] | None]

    def refine(self, features: Mapping[int, Tensor], batch: Batch) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Return features {block: (B, N, d)} that the adapters have cleaned, and the adapters' weighted losses.

        Each loss is a mean over the blocks. It is in proportion to the records of this part of the batch, so that parts
        add up.
        """
        s, real = self.settings, len(batch.weights) - batch.filling
        with torch.autocast(batch.weights.device.type, enabled=False):
            refined = self.adapters(features)
            if not real:
                zero = 0.0 * torch.stack([x.sum() for x in refined.values()]).sum()
                return refined, dict.fromkeys(s.loss_weights, zero)
            before, after = ({block: x[:real] for block, x in tokens.items()} for tokens in (features, refined))
            seen = RefinementBatch(before, after, self.suffix, self.scales, self.prefix, self.grids)
            found = adapter_losses(seen, list(refined), s.outlier_form, s.info_form, s.quantile, s.loss_weights)
            return refined, {name: loss * batch.weights.sum() for name, loss in found.weighted.items()}


def new_joint(cache: Cache, settings: RefineConfig, device: torch.device) -> JointTraining:
    """Return new adapters in their starting subspace, with what their losses need."""
    settings = settings.model_copy(update={"cleaner": "adapter", "normaliser": "none"})
    fit = RefinerFit(cache, settings, np.arange(len(cache)), device)
    grids = {block: fit.refiner.cleaner(block).spec.grid for block in cache.blocks}
    assert fit.suffix is not None
    prefix = cache.manifest.teacher.prefix_tokens
    return JointTraining(fit.refiner, fit.suffix, fit.scales, settings, prefix, grids)
