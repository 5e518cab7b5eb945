"""Theia's and AM-RADIO's mixture (arXiv 2407.20179, 2312.06709)."""

from torch import Tensor
from torch.nn import functional as F

from singer.objectives.base import Objective


def cosine_and_smooth_l1(student: Tensor, target: Tensor, cosine: float, smooth: float) -> Tensor:
    """Compute cosine · (1 - cos) + smooth · smooth L1 of every token, (B, N, d) -> (B, N)."""
    direction = 1 - F.cosine_similarity(student, target, dim=-1)
    return cosine * direction + smooth * F.smooth_l1_loss(student, target, reduction="none").mean(-1)


class Theia(Objective):
    """0.9 cosine + 0.1 smooth L1, mean over tokens."""

    tokenwise = True

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute Theia's loss (B,) of one block's tokens (B, N, d)."""
        return cosine_and_smooth_l1(student, target, 0.9, 0.1).mean(1)
