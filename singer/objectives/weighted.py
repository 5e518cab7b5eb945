"""Patches by their importance, the part of CMD (cross-level multi-instance distillation) that a cache can give.

An image is a bag of patches, and those that resemble what the teacher says of the whole image count for more.
"""

import torch
from torch import Tensor

from singer.objectives.base import Objective


class Weighted(Objective):
    """Mean squared error of patches, weighted by their cosine similarity to the teacher's CLS (else its mean patch).

    The weights are a softmax at `temperature`, as in attention pooling; their mean is 1. CLS counts like one patch.
    """

    temperature = 0.2

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block's tokens (B, N, d)."""
        prefix = self.context.prefix
        patches = target[:, prefix:]
        whole = target[:, :1] if prefix else patches.mean(1, keepdim=True)
        likeness = torch.cosine_similarity(patches, whole, dim=-1) / self.temperature
        weights = likeness.softmax(-1) * patches.shape[1]
        errors = (student - target).square().mean(-1)
        weights = torch.cat([weights.new_ones(len(weights), prefix), weights], dim=1)
        return (weights * errors).mean(1)
