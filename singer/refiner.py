"""Refiners: {block: features (B, N, d)} -> {block: targets (B, N, d)}; a cleaner of artifacts, then a normaliser.

Both parts come from a registry; a new one is a class that takes (d, prefix tokens, rank) and one line. All state is
buffers and parameters, so a refiner is a state dict and the two names.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Keep(nn.Module):
    """`none`: features as they are."""

    def __init__(self, d: int, prefix: int, rank: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class Adapter(nn.Module):
    """`adapter`: x + (x·down)·up on patch tokens; prefix tokens stay (SiNGER). down (d, r), up (r, d)."""

    def __init__(self, d: int, prefix: int, rank: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.down = nn.Parameter(torch.zeros(d, rank))
        self.up = nn.Parameter(torch.zeros(rank, d))

    @torch.no_grad()
    def start(self, directions: Tensor) -> None:
        """Start in the span of orthonormal directions (d, r), as the identity: down = V, up = 0.

        The paper's up = Vᵀ doubles the component in that span, so that norms rise at first.
        """
        self.down.copy_(directions)
        self.up.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.prefix :]
        refined = patches + (patches @ self.down) @ self.up
        return torch.cat([tokens[:, : self.prefix], refined], dim=1)


class Clip(nn.Module):
    """`clip`: patch tokens above the robust threshold are scaled down to it; the plainest control."""

    threshold: Tensor

    def __init__(self, d: int, prefix: int, rank: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.prefix :]
        norms = patches.norm(dim=-1, keepdim=True)
        clipped = patches * (self.threshold / norms).clamp_max(1)
        return torch.cat([tokens[:, : self.prefix], clipped], dim=1)


class Standardize(nn.Module):
    """`standardize`: per-channel zero mean and unit variance by the statistics of clean tokens.

    Every prefix token position has statistics of its own: CLS lives in another part of the space.
    """

    mean: Tensor
    std: Tensor
    prefix_mean: Tensor
    prefix_std: Tensor

    def __init__(self, d: int, prefix: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))
        self.register_buffer("prefix_mean", torch.zeros(prefix, d))
        self.register_buffer("prefix_std", torch.ones(prefix, d))

    def forward(self, tokens: Tensor) -> Tensor:
        prefix = self.prefix_mean.shape[0]
        return torch.cat(
            [
                (tokens[:, :prefix] - self.prefix_mean) / self.prefix_std,
                (tokens[:, prefix:] - self.mean) / self.std,
            ],
            dim=1,
        )


class TokenNorm(nn.Module):
    """`layernorm`: affine-free LayerNorm of every token."""

    def __init__(self, d: int, prefix: int, rank: int) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:])


CLEANERS: dict[str, type[nn.Module]] = {"adapter": Adapter, "clip": Clip, "none": Keep}
NORMALISERS: dict[str, type[nn.Module]] = {"standardize": Standardize, "layernorm": TokenNorm, "none": Keep}


class Refiner(nn.Module):
    """A cleaner and a normaliser for every cached block.

    widths: {block: d}; prefix: prefix tokens of the teacher; rank: of the adapters (unused by other cleaners).
    """

    def __init__(self, widths: Mapping[int, int], prefix: int, cleaner: str, normaliser: str, rank: int) -> None:
        super().__init__()
        self.cleaners = nn.ModuleDict({str(b): CLEANERS[cleaner](d, prefix, rank) for b, d in widths.items()})
        self.normalisers = nn.ModuleDict({str(b): NORMALISERS[normaliser](d, prefix, rank) for b, d in widths.items()})

    def clean(self, tokens: Tensor, block: int) -> Tensor:
        """Features (B, N, d) of one block without artifacts, still in the teacher's units."""
        cleaned: Tensor = self.cleaners[str(block)](tokens)
        return cleaned

    def forward(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {b: self.normalisers[str(b)](self.clean(x, b)) for b, x in features.items()}
