"""CLS and patches at equal weight (UNIC, arXiv 2408.05088): among hundreds of tokens, CLS would hardly count."""

from torch import Tensor

from singer.objectives.base import Objective
from singer.objectives.theia import cosine_and_smooth_l1


def halves(losses: Tensor, prefix: int) -> Tensor:
    """Average token losses (B, N) -> (B,): half the mean over prefix tokens plus half the mean over patches."""
    if not prefix:
        return losses.mean(1)
    return 0.5 * (losses[:, :prefix].mean(1) + losses[:, prefix:].mean(1))


class Unic(Objective):
    """Cosine + smooth L1, half on CLS and half on the patches."""

    tokenwise = True

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute UNIC's loss (B,) of one block's tokens (B, N, d)."""
        return halves(cosine_and_smooth_l1(student, target, 1.0, 1.0), self.context.prefix)
