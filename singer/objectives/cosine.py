"""Matching directions: blind to the length of tokens, and so to that of artifacts."""

from torch import Tensor
from torch.nn import functional as F

from singer.objectives.base import Objective


class Cosine(Objective):
    """1 - cosine of student and target, mean over tokens."""

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        return (1 - F.cosine_similarity(student, target, dim=-1)).mean(1)
