"""Run a Vision Transformer on a random share of its patch tokens while it is trained.

PatchDropout (Liu et al., 2022, arXiv:2208.07220) for distillation: the targets are gathered at the patches that were
kept, so that the loss needs no mask tokens, and a step costs about the share of the tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from singer.backbones import gives_tokens
from singer.errors import UserError
from singer.tokens import take_patches


class PatchDropout(nn.Module):
    """Keep all prefix tokens and a random share of the patches of each image, in order.

    It takes the place of timm's own: `share` may change from step to step, and `kept` (B, k) says which patches the
    last batch kept; None if it kept all. returns_kept: return `kept` too, as models with rotary embeddings want.
    """

    def __init__(self, prefix: int, returns_kept: bool) -> None:
        super().__init__()
        self.prefix, self.returns_kept = prefix, returns_kept
        self.share = 1.0
        self.kept: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return (B, P + k, d) of tokens (B, P + N, d): the prefix, and k = share · N of the N patches, at least 1."""
        self.kept = None
        patches = tokens.shape[1] - self.prefix
        count = max(1, round(self.share * patches))
        if self.training and count < patches:
            drawn = torch.rand(len(tokens), patches, device=tokens.device)
            self.kept = drawn.topk(count, dim=1).indices.sort(dim=1).values
            tokens = take_patches(tokens, self.prefix, self.kept)
        return (tokens, self.kept) if self.returns_kept else tokens


def can_leave_out_patches(model: nn.Module) -> bool:
    """Return whether a model of timm has a place for the dropout of patches."""
    place: Any = getattr(model, "patch_drop", "missing")
    return gives_tokens(model) and (place is None or isinstance(place, nn.Module))


def install(model: nn.Module) -> PatchDropout:
    """Give a model of timm this dropout of patches; it keeps all until its `share` is set.

    Raises UserError if the model has no place for it.
    """
    if not can_leave_out_patches(model):
        raise UserError(
            f"distill.token_share: a {type(model).__name__} cannot leave out patches; set it to 1, or take a student "
            "such as vit"
        )
    # Models that have None here take the kept patches too, for their rotary embeddings.
    returns_kept = model.patch_drop is None
    model.patch_drop = PatchDropout(int(model.num_prefix_tokens), returns_kept)  # type: ignore[arg-type]
    return model.patch_drop
