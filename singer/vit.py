"""Vision Transformers of timm, seen as what distillation needs: images in, tokens of chosen blocks out."""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def depth(model: VisionTransformer) -> int:
    return len(model.blocks)


def grid_size(model: VisionTransformer) -> tuple[int, int]:
    """(rows, columns) of patch tokens at the resolution that the model was built for."""
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)


def resolve_blocks(blocks: Sequence[int] | None, model_depth: int) -> list[int]:
    """Block numbers as sorted non-negative ones. Negative numbers count from the end.

    The default is the paper's choice of one intermediate block at three quarters of the depth and the last:
    {8, 11} of 12 and {17, 23} of 24. Raises ValueError for a block that does not exist or is named twice.
    """
    if blocks is None:
        return sorted({max(0, round(0.75 * model_depth) - 1), model_depth - 1})
    wrong = [b for b in blocks if not -model_depth <= b < model_depth]
    if wrong:
        raise ValueError(
            f"block {wrong[0]} does not exist: this model has {model_depth} blocks, 0 to {model_depth - 1}"
        )
    resolved = sorted(b % model_depth for b in blocks)
    if len(set(resolved)) < len(resolved) or not resolved:
        raise ValueError(f"blocks must be one or more different ones, not {list(blocks)}")
    return resolved


def block_outputs(model: VisionTransformer, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Raw outputs (B, P + patches, d) of the given blocks, before the final norm.

    images: (B, 3, H, W), normalised. Nothing after the last wanted block is computed.
    """
    outputs = model.forward_intermediates(
        images,
        indices=list(blocks),
        return_prefix_tokens=True,
        norm=False,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    tokens = {}
    for block, output in zip(blocks, outputs, strict=True):
        if isinstance(output, tuple):
            patches, prefix = output
            output = torch.cat([prefix, patches], dim=1)
        tokens[block] = output
    return tokens


def freeze_unused(model: VisionTransformer, last_block: int) -> None:
    """Stop gradients of what lies behind the last supervised block: it would get none, and DDP refuses that."""
    behind: list[nn.Module] = [*model.blocks[last_block + 1 :], model.norm, model.fc_norm, model.head]
    if getattr(model, "attn_pool", None) is not None:
        behind.append(model.attn_pool)
    for module in behind:
        module.requires_grad_(False)
