"""What distillation needs of a model: images go in, tokens of chosen blocks come out.

What a model can do decides, and not its class. A model of tokens (ViT, Eva, Beit, NaFlexVit ...) gives its prefix
tokens and patches. Any other model that has timm's forward_intermediates gives the positions of its feature maps as
patch tokens, stage by stage: a stage counts as a block, and there are no prefix tokens. Other modules get these methods
from `singer.described`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singer.errors import UserError
from singer.sizes import ImageSize, Size


def gives_tokens(model: nn.Module) -> bool:
    """Return whether a model of timm returns prefix tokens and patches, and not feature maps."""
    forward: Any = getattr(model, "forward_intermediates", None)
    return forward is not None and "return_prefix_tokens" in inspect.signature(forward).parameters


def count_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, wherever they are."""
    return sum(p.numel() for p in model.parameters())


def prefix_tokens(model: nn.Module) -> int:
    """Return the number of tokens before the patches: CLS, if there is one, and registers."""
    return int(getattr(model, "num_prefix_tokens", 0)) if gives_tokens(model) else 0


def has_cls(model: nn.Module) -> bool:
    """Return whether the first token is a class token. In all of timm it comes first."""
    told = getattr(model, "has_class_token", None)
    return prefix_tokens(model) > 0 and (getattr(model, "cls_token", None) is not None if told is None else bool(told))


def patch_size(model: nn.Module) -> ImageSize | None:
    """Return the size of a patch, in pixels, of a model of tokens; None for other models."""
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    size: Any = getattr(embed, "patch_size", None) or getattr(model, "patch_size", None)
    if size is None or not gives_tokens(model):
        return None
    return Size.of(size).written


def body_width(model: nn.Module) -> int:
    """Return the width, in channels, of the blocks of a model of tokens but the last, which may be wider (exits)."""
    width: Any = getattr(model, "body_dim", None) or model.embed_dim
    return int(width)


def depth(model: nn.Module) -> int:
    """Return the number of blocks of a model of tokens, or of stages of another model."""
    info: Any = model.feature_info
    return len(info)


def final_norm(model: nn.Module) -> nn.Module | None:
    """Return the norm of the tokens after the last block, if there is one; models that pool first call it fc_norm."""
    if not gives_tokens(model):
        return None
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return None


@torch.no_grad()
def layout(model: nn.Module, image_size: ImageSize) -> list[tuple[int, tuple[int, int]]]:
    """List (width, (rows, columns)) of the tokens of every block at an image size in pixels."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if gives_tokens(model) and grid is not None:
        place = (int(grid[0]), int(grid[1]))
        last: Any = model.embed_dim
        return [*[(body_width(model), place)] * (depth(model) - 1), (int(last), place)]
    training, like = model.training, next(model.parameters())
    model.eval()
    maps = _maps(model, torch.zeros(1, 3, *Size.of(image_size)).to(like), range(depth(model)))
    model.train(training)
    return [(int(x.shape[1]), (int(x.shape[2]), int(x.shape[3]))) for x in maps]


def resolve_blocks(blocks: Sequence[int] | None, model_depth: int) -> list[int]:
    """Return block numbers as sorted non-negative numbers. Negative numbers count from the end.

    The default is the paper's choice of one intermediate block at three quarters of the depth and the last:
    {8, 11} of 12 and {17, 23} of 24. Raises UserError for a block that does not exist or is named twice.
    """
    if blocks is None:
        return sorted({max(0, round(0.75 * model_depth) - 1), model_depth - 1})
    wrong = [b for b in blocks if not -model_depth <= b < model_depth]
    if wrong:
        raise UserError(f"block {wrong[0]} does not exist: this model has {model_depth} blocks, 0 to {model_depth - 1}")
    resolved = sorted(b % model_depth for b in blocks)
    if len(set(resolved)) < len(resolved) or not resolved:
        raise UserError(f"blocks must be one or more different numbers, not {list(blocks)}")
    return resolved


def block_outputs(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return raw outputs (B, P + patches, d) of the given blocks, before the final norm.

    images: (B, 3, H, W), normalised. Nothing after the last wanted block is computed.
    """
    if not gives_tokens(model):
        maps = _maps(model, images, blocks)
        return {b: x.flatten(2).transpose(1, 2) for b, x in zip(blocks, maps, strict=True)}
    outputs = model.forward_intermediates(  # type: ignore[operator]
        images,
        indices=list(blocks),
        return_prefix_tokens=prefix_tokens(model) > 0,
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


def _maps(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Return the feature maps (B, d, rows, columns) of some stages."""
    maps: list[Tensor] = model.forward_intermediates(  # type: ignore[operator]
        images, indices=list(blocks), stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps


def freeze_unused(model: nn.Module, last_block: int | None, image_size: ImageSize) -> None:
    """Freeze the parameters that have no part in the blocks up to the last supervised one; None: in the model's output.

    They would get no gradient, and DDP refuses that. A backward pass from these blocks finds the others.
    image_size: in pixels.
    """
    training, place = model.training, next(model.parameters())
    model.eval()
    with torch.enable_grad():
        images = torch.zeros(1, 3, *Size.of(image_size)).to(place)
        outputs = (
            (model(images),)
            if last_block is None
            else tuple(block_outputs(model, images, range(last_block + 1)).values())
        )
        torch.stack([x.float().sum() for x in outputs]).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    model.train(training)


def freeze_others(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the parameters that are not named, each by its name or the parts with which it begins (blocks.11).

    Those that are frozen stay so. Raises UserError if a name stands for none that would be trained.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in names:
        if not any(_begins(own, name) for own in wanted):
            parts = dict.fromkeys(".".join(own.split(".")[: 1 + own.startswith("blocks.")]) for own in wanted)
            raise UserError(f"distill.trained: no weights {name!r} would be trained; there are {', '.join(parts)}")
    for own, parameter in wanted.items():
        parameter.requires_grad_(any(_begins(own, name) for name in names))


def _begins(own: str, name: str) -> bool:
    return f"{own}.".startswith(f"{name}.")
