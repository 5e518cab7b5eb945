"""Cleaners: features (B, N, d) of a block -> the same without artifacts, in the teacher's units. Prefix tokens stay.

A new one is a class that takes a Shape and a registry line. `fit` sets what has a closed form; a cleaner with
`trained = True` is fitted by gradient instead. All state is buffers and parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singer.artifacts import clean_mask, clip_norms, expected_patches
from singer.curvature import curvature
from singer.fit_context import FitContext


@dataclass(frozen=True)
class Shape:
    """Of a block's features: width d, prefix tokens, the grid of the patches (None if only some are stored).

    rank: of adapters. softness: μ of the projector.
    """

    width: int
    prefix: int
    grid: tuple[int, int] | None
    rank: int = 1
    softness: float = 1.0


class Cleaner(nn.Module):
    """`none`: features as they are; the others derive from it and give `patches`."""

    trained = False
    # Whether `fit` looks at tokens, and not at the scale alone.
    needs_tokens = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def fit(self, context: FitContext) -> None:
        """Set buffers from the evidence of the block."""

    def patches(self, patches: Tensor) -> Tensor:
        """Clean patch tokens (B, patches, d)."""
        return patches

    def forward(self, tokens: Tensor) -> Tensor:
        prefix = self.shape.prefix
        return torch.cat([tokens[:, :prefix], self.patches(tokens[:, prefix:])], dim=1)


class Clip(Cleaner):
    """`clip`: patch tokens above the robust threshold are scaled down to it; the plainest control."""

    threshold: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def fit(self, context: FitContext) -> None:
        self.threshold.fill_(context.scale.threshold)

    def patches(self, patches: Tensor) -> Tensor:
        return clip_norms(patches, self.threshold)


class Neighbour(Clip):
    """`neighbour`: artifacts become the mean of the clean patches around them (SINDER, arXiv 2407.16826).

    Where the cache holds a share of the patches, the mean of all clean ones of the image. Where an image has no clean
    patch, as `clip`.
    """

    def patches(self, patches: Tensor) -> Tensor:
        clean = clean_mask(patches.norm(dim=-1), self.threshold)
        return torch.where(clean.unsqueeze(-1), patches, expected_patches(patches, self.threshold, self.shape.grid))


class Projector(Neighbour):
    """`projector`: artifacts move to the mean t of their clean neighbours, most where the final norm sees least.

    Closed form, no training: x - (I + μC̃)⁻¹(x - t), C̃ = C·d/tr C, for tokens above the threshold. It minimises
    |x' - t|² + μ(x' - x)ᵀC̃(x' - x). What is still above the threshold then is scaled down to it.
    """

    needs_tokens = True
    move: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("move", torch.zeros(shape.width, shape.width))

    def fit(self, context: FitContext) -> None:
        super().fit(context)
        seen = curvature(context, "final-norm")
        d = len(seen)
        eye = torch.eye(d, dtype=seen.dtype, device=seen.device)
        scaled = seen * d / seen.diagonal().sum()
        self.move.copy_(torch.linalg.inv(eye + self.shape.softness * scaled))

    def patches(self, patches: Tensor) -> Tensor:
        return clip_norms(patches - (patches - super().patches(patches)) @ self.move, self.threshold)


class Adapter(Cleaner):
    """`adapter`: x + (x·down)·up on patch tokens (SiNGER). down (d, r), up (r, d)."""

    trained = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.down = nn.Parameter(torch.zeros(shape.width, shape.rank))
        self.up = nn.Parameter(torch.zeros(shape.rank, shape.width))

    @torch.no_grad()
    def start(self, directions: Tensor, doubled: bool = False) -> None:
        """Start in the span of directions V (d, r), as the identity: down = V, up = 0.

        doubled: up = Vᵀ as in the paper, which doubles the component in that span, so that norms rise at first.
        """
        self.down.copy_(directions)
        self.up.copy_(directions.T) if doubled else self.up.zero_()

    def patches(self, patches: Tensor) -> Tensor:
        return patches + (patches @ self.down) @ self.up


CLEANERS: dict[str, type[Cleaner]] = {
    "adapter": Adapter,
    "projector": Projector,
    "neighbour": Neighbour,
    "clip": Clip,
    "none": Cleaner,
}
