"""Matching in which large errors do not dominate."""

from torch import Tensor
from torch.nn import functional as F

from singer.objectives.base import Objective


class SmoothL1(Objective):
    """Smooth L1 (Huber's, β = 1) over tokens and channels."""

    tokenwise = True

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute the smooth L1 loss (B,) of one block's tokens (B, N, d)."""
        return F.smooth_l1_loss(student, target, reduction="none").mean(dim=(1, 2))
