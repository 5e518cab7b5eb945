"""Matching of directions: the length of tokens does not count, and so that of artifacts does not either."""

from torch import Tensor
from torch.nn import functional as F

from singer.objectives.base import Objective


class Cosine(Objective):
    """1 - cosine of student and target, mean over tokens."""

    tokenwise = True

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute 1 - cosine (B,) of one block's tokens (B, N, d)."""
        return (1 - F.cosine_similarity(student, target, dim=-1)).mean(1)
