"""The frozen suffix of a teacher: what comes after the cached features, rebuilt without the rest of the model."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from singer.errors import UserError

_FRONT = ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre", "pos_drop", "patch_drop")


def suffix_state(state: Mapping[str, Tensor], first_block: int) -> dict[str, Tensor]:
    """Take the part of a timm VisionTransformer state dict that belongs to the suffix from first_block on."""
    kept = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] in _FRONT or (parts[0] == "blocks" and int(parts[1]) < first_block):
            continue
        kept[name] = tensor
    return kept


class TeacherSuffix(nn.Module):
    """Blocks first_block.. of a timm VisionTransformer with its final norm and head; frozen, in eval mode.

    It also holds the first cached block: some readers of its output need the block's own weights.
    architecture, model_args: what timm.create_model takes to build the teacher.
    state: what `suffix_state` returns.
    """

    def __init__(
        self, architecture: str, model_args: Mapping[str, Any], first_block: int, state: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            # Without memory there is nothing to initialise, and an attempt takes most of the time.
            model = timm.create_model(architecture, pretrained=False, weight_init="skip", **model_args)
        self.depth = len(model.blocks)
        self.first_block = first_block
        for block in range(first_block):
            model.blocks[block] = nn.Identity()
        for name in _FRONT:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        model.load_state_dict(dict(state), strict=True, assign=True)
        self.model = model.requires_grad_(False).eval()

    def block(self, index: int) -> nn.Module:
        """Return block `index` of the teacher. index: first_block to depth - 1."""
        assert self.first_block <= index < self.depth, f"the suffix has blocks {self.first_block} to {self.depth - 1}"
        module: nn.Module = self.model.blocks[index]
        return module

    def is_last(self, block: int) -> bool:
        """Return whether a block is the teacher's last one."""
        return block == self.depth - 1

    def next_output(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of block + 1 for tokens (B, N, d) of `block`; return them if it is the last."""
        if self.is_last(block):
            return tokens
        output: Tensor = self.block(block + 1)(tokens)
        return output

    def next_norm(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of the norm that first reads the tokens (B, N, d) of `block`."""
        module = self.model.norm if self.is_last(block) else first_norm(self.block(block + 1))
        output: Tensor = module(tokens)
        return output

    def last_output(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the output (B, N, d) of the last block for the tokens (B, N, d) of `block`."""
        for index in range(block + 1, self.depth):
            tokens = self.block(index)(tokens)
        return tokens

    def normed(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the final normed tokens (B, N, d) for the tokens (B, N, d) of `block`.

        In models that pool before their norm, it is fc_norm.
        """
        output: Tensor = self.model.fc_norm(self.model.norm(self.last_output(tokens, block)))
        return output

    def logits(self, tokens: Tensor, block: int) -> Tensor:
        """Compute the teacher's own output (B, classes) for the tokens (B, N, d) of `block`.

        It is the pooled features (B, d) if the teacher has no head.
        """
        output: Tensor = self.model.forward_head(self.model.norm(self.last_output(tokens, block)))
        return output


def first_norm(block: nn.Module) -> nn.Module:
    """Find the norm before a block's first branch. Raises UserError if it has none there (res-post-norm)."""
    for name in ("norm1", "in_norm"):
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module) and not isinstance(block, ResPostBlock):
            return norm
    branches = getattr(block, "attns", None)
    if isinstance(branches, nn.ModuleList):  # parallel branches, each with a norm of its own
        return next(m for n, m in branches[0].named_children() if n == "norm")
    raise UserError("this teacher's blocks have no norm at their input; take the reader branch or final-norm")
