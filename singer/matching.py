"""Which student block learns from which teacher block, and how token grids of different sizes are compared."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError


def match_blocks(teacher_blocks: Sequence[int], teacher_depth: int, student_depth: int) -> dict[int, int]:
    """Return {teacher block: student block}: each student block is used at most once, in order, by relative depth.

    Depth is counted at a block's OUTPUT, (l + 1) / depth, so that the last block gets the last one and equal depths
    give the identity. (Counted at the input, as in the authors' code, the student's last block has no target.)
    Raises UserError if there are more teacher blocks than student blocks.
    """
    if len(teacher_blocks) > student_depth:
        raise UserError(
            f"{len(teacher_blocks)} teacher blocks cannot be matched to {student_depth} student blocks: "
            "cache fewer blocks or take a deeper student"
        )
    # This import takes half a second, which only training needs to spend.
    from scipy.optimize import linear_sum_assignment

    teacher = (np.array(teacher_blocks) + 1) / teacher_depth
    student = (np.arange(student_depth) + 1) / student_depth
    rows, columns = linear_sum_assignment(np.square(teacher[:, None] - student[None]))
    return {teacher_blocks[r]: int(c) for r, c in zip(rows, columns, strict=True)}


def take_patches(tokens: Tensor, prefix: int, positions: Tensor) -> Tensor:
    """Take the prefix tokens and the patches at positions (B, k): (B, P + patches, d) -> (B, P + k, d)."""
    rows = positions.to(tokens.device).long().unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, rows)], dim=1)


def resize_tokens(tokens: Tensor, prefix: int, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Interpolate the patch grid of tokens (B, P + rows·columns, d) to the target (rows, columns)."""
    if grid == target:
        return tokens
    patches = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    patches = F.interpolate(patches, size=target, mode="bilinear", antialias=True)
    return torch.cat([tokens[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)
