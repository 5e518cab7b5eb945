"""ACAM-KD (arXiv 2503.06307): masks that are learned from student and teacher say where features are compared.

The authors' code is not published; constants are those of the paper as other pages give them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singer.objectives.base import Objective, ObjectiveContext


class Fusion(nn.Module):
    """Attention of the teacher's tokens over the student's, and masks of channels and of patches that it gives."""

    def __init__(self, width: int, masks: int) -> None:
        super().__init__()
        half = max(1, width // 2)
        self.query, self.key, self.value = (nn.Linear(width, half) for _ in range(3))
        self.out = nn.Linear(half, width)
        self.channel_tokens, self.patch_tokens = (nn.Parameter(0.02 * torch.randn(masks, width)) for _ in range(2))

    def forward(self, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks of channels (B, masks, d) and of patches (B, masks, N) for patches (B, N, d)."""
        query, key, value = self.query(target), self.key(student), self.value(student)
        fused = self.out(F.scaled_dot_product_attention(query, key, value))
        # Each token selects channels of the mean patch, or patches.
        channels = torch.sigmoid(self.channel_tokens * fused.mean(1, keepdim=True))
        patches = torch.sigmoid(self.patch_tokens @ fused.transpose(1, 2))
        return channels, patches


class Acam(Objective):
    """Masked mean squared error of patches, by channels and by places, and the Dice coefficient between masks.

    Diversity alone keeps the masks from vanishing: each is scaled to a mean of 1, and no two may be alike.
    """

    masks = 6
    diversity = 1.0

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.fusions = nn.ModuleDict({str(b): Fusion(context.width_of(b), self.masks) for b in context.blocks})

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block's tokens (B, N, d); CLS counts as one more patch without a mask."""
        prefix = self.context.prefix
        ours, theirs = student[:, prefix:], target[:, prefix:]
        channels, patches = self.fusions[str(block)](ours, theirs)
        error = (ours - theirs).square()
        by_channel = (_weights(channels) * error.mean(1, keepdim=True)).mean((1, 2))
        by_patch = (_weights(patches) * error.mean(2).unsqueeze(1)).mean((1, 2))
        loss = 0.5 * (by_channel + by_patch) + self.diversity * (dice(channels) + dice(patches))
        if prefix:
            loss = loss + (student[:, :prefix] - target[:, :prefix]).square().mean((1, 2)) / (ours.shape[1] + 1)
        return loss


def _weights(masks: Tensor) -> Tensor:
    """Scale masks (B, M, n) to a mean of 1."""
    return masks / masks.mean(-1, keepdim=True).clamp_min(1e-6)


def dice(masks: Tensor) -> Tensor:
    """Compute the mean Dice coefficient (B,) between two different masks of (B, M, n)."""
    overlap = 2 * masks @ masks.transpose(1, 2)
    mass = masks.square().sum(-1)
    coefficients = overlap / (mass.unsqueeze(2) + mass.unsqueeze(1)).clamp_min(1e-6)
    count = masks.shape[1]
    others = ~torch.eye(count, dtype=torch.bool, device=masks.device)
    return (coefficients * others).sum((1, 2)) / max(1, count * (count - 1))
