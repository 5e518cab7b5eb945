"""Gram anchoring (DINOv3, arXiv 2508.10104): it compares similarities between patches, not the tokens."""

from torch import Tensor

from singer.adapter_losses import cosine_gram
from singer.objectives.base import Objective


class Gram(Objective):
    """Mean squared error of the cosine Grams of the patches."""

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compare the cosine Grams of one block's patches; losses (B,)."""
        prefix = self.context.prefix
        return (cosine_gram(student[:, prefix:]) - cosine_gram(target[:, prefix:])).square().mean(dim=(1, 2))
