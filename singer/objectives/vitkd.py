"""ViTKD's masked generation (arXiv 2209.02432)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singer.errors import UserError
from singer.objectives.base import Objective, ObjectiveContext


class Generator(nn.Module):
    """conv3x3, ReLU, conv3x3 on the grid of patch tokens (B, N, d); prefix tokens pass through."""

    def __init__(self, width: int, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, grid
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Generate patch tokens from tokens (B, N, d)."""
        maps = tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        generated = self.conv2(F.relu(self.conv1(maps)))
        return torch.cat([tokens[:, : self.prefix], generated.flatten(2).transpose(1, 2)], dim=1)


class VitKd(Objective):
    """Mean squared error of masked tokens: the student's tokens, half of them masked, must generate the teacher's.

    With several blocks, the last is generated and the others are matched linearly (mean squared error), as in the
    paper. The authors of SiNGER generate at every block.
    """

    batchwise = True
    needs_all_patches = True
    mask_ratio = 0.5

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        if context.grid is None:
            raise UserError(
                "distill.objective vitkd needs all patches of an image, but the cache holds a share of them"
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, context.width))
        self.generators = nn.ModuleDict(
            {str(b): Generator(context.width, context.prefix, context.grid) for b in context.blocks[-1:]}
        )

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block's tokens (B, N, d), with a mask drawn at random."""
        if str(block) not in self.generators:
            return (student - target).square().mean(dim=(1, 2))
        return self.generation_loss(student, target, block, torch.rand_like(student[..., :1]))

    def generation_loss(self, student: Tensor, target: Tensor, block: int, noise: Tensor) -> Tensor:
        """Compute losses (B,) for noise (B, N, 1), uniform in [0, 1); tokens with noise <= the mask ratio are masked.

        Their mean over the batch is the mean over all masked tokens of the batch.
        """
        mask = (noise <= self.mask_ratio).to(student.dtype)
        generated = self.generators[str(block)](student * (1 - mask) + self.mask_token * mask)
        error = ((generated - target).square() * mask).mean(-1).sum(1)
        losses: Tensor = error * len(mask) / mask.sum().clamp_min(1)
        return losses
