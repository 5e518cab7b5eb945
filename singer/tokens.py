"""Select, pool, place and resize the tokens (B, N, d) of a block, so that two models can be compared."""

import torch
from torch import Tensor
from torch.nn import functional as F


def select_tokens(tokens: Tensor, prefix: int, keep_cls: bool) -> Tensor:
    """Return CLS (if kept) and the patches of tokens (B, N, d); registers are never compared between models."""
    patches = tokens[:, prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_cls else patches


def global_tokens(tokens: Tensor, prefix: int, class_token: bool) -> Tensor:
    """Return CLS of tokens (B, N, d), or without CLS the mean of the patches, (B, d)."""
    return tokens[:, 0] if class_token else tokens[:, prefix:].mean(1)


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
