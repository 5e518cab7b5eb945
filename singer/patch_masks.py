"""Mask a random share of an image's patches for a Vision Transformer: one learnt token takes the place of all of them.

The student then has to know the teacher's tokens at places that it does not see (the masked patches of iBOT,
arXiv:2111.07832, with a teacher that sees the whole image, as in Proteus, arXiv:2407.10366).
"""

from typing import Any

import torch
from torch import Tensor, nn

from singer.backbones import body_width, gives_tokens
from singer.errors import UserError

_STD = 0.02


def patch_embedding(model: nn.Module) -> nn.Module:
    """Return the module that makes the patches of a model. Raises UserError if these cannot be masked."""
    embed: Any = getattr(model, "patch_embed", None)
    if not gives_tokens(model) or not isinstance(embed, nn.Module):
        raise UserError(
            f"distill.mask_share: singer cannot mask patches of a {type(model).__name__}; set it to 0, or take a "
            "student such as vit"
        )
    return embed


class PatchMasks(nn.Module):
    """Put a mask token in the place of a share of the patches, before positions are added to them.

    It acts on the patch embedding of a model of timm, and only while it is `active`; `masked` (B, N) then says which
    patches of the last batch it masked, one in `rarity`. The token is no part of the model.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        """Watch a model; share: of its patches that are masked. Raises UserError if it has no patch embedding."""
        super().__init__()
        embed = patch_embedding(model)
        self.share, self.active = share, False
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(body_width(model)), std=_STD))
        self.masked: Tensor | None = None
        self.rarity = 1.0
        embed.register_forward_hook(self._mask)

    def _mask(self, embed: nn.Module, images: Any, patches: Tensor) -> Tensor:
        """Mask some of the patches, (B, N, d) or (B, rows, columns, d)."""
        if not self.active:
            return patches
        places = patches.shape[:-1].numel() // len(patches)
        count = max(1, round(self.share * places))
        self.rarity = places / count
        drawn = torch.rand(len(patches), places, device=patches.device).topk(count, dim=1).indices
        self.masked = torch.zeros(len(patches), places, dtype=torch.bool, device=patches.device).scatter(1, drawn, True)
        return torch.where(self.masked.view(*patches.shape[:-1], 1), self.mask_token.to(patches.dtype), patches)


def only_masked(target: Tensor, student: Tensor, masked: Tensor) -> Tensor:
    """Return targets (B, P + N, d) at the masked patches, and the student's own tokens at all other places.

    masked: (B, N). At those others, an objective of single tokens has no loss and no gradient.
    """
    prefix = target.shape[1] - masked.shape[1]
    whole = torch.cat([masked.new_zeros(len(masked), prefix), masked], dim=1).unsqueeze(-1)
    return torch.where(whole, target, student.detach())
