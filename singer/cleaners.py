"""Cleaners: features (B, N, d) of a block -> the same without artifacts, in the teacher's units. Prefix tokens stay.

A new cleaner is a class that takes a BlockSpec, and a line in the registry. `fit` sets what has a closed form; a
cleaner with `trained = True` is fitted by gradient instead. All state is buffers and parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singer.artifacts import BlockScale, clean_mask, clip_norms, expected_patches
from singer.curvature import curvature
from singer.fit_context import FitContext


@dataclass(frozen=True)
class BlockSpec:
    """A block's features: width d, prefix tokens, the grid of the patches (None if only some are stored).

    rank: the rank r of adapters. softness: μ of the projector.
    """

    width: int
    prefix: int
    grid: tuple[int, int] | None
    rank: int = 1
    softness: float = 1.0


class Cleaner(nn.Module):
    """`none`: features stay as they are. The other cleaners derive from this class and override `patches`."""

    trained = False
    # True if it cannot be fitted without the teacher's suffix.
    needs_suffix = False
    # True if `fit` reads tokens and not only the scale.
    needs_tokens = False

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec

    def fit(self, context: FitContext) -> None:
        """Set buffers from a sample of the block's features."""

    def patches(self, patches: Tensor) -> Tensor:
        """Return patch tokens (B, patches, d) without artifacts."""
        return patches

    def forward(self, tokens: Tensor) -> Tensor:
        """Clean the patches of tokens (B, N, d)."""
        prefix = self.spec.prefix
        return torch.cat([tokens[:, :prefix], self.patches(tokens[:, prefix:])], dim=1)


class Clip(Cleaner):
    """`clip`: patch tokens above the robust threshold are scaled down to it. This is the plainest control."""

    threshold: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def fit(self, context: FitContext) -> None:
        """Take the threshold of the block."""
        self.threshold.fill_(context.scale.threshold)

    def patches(self, patches: Tensor) -> Tensor:
        """Scale patch tokens (B, patches, d) above the threshold down to it."""
        return clip_norms(patches, self.threshold)


class Neighbour(Clip):
    """`neighbour`: artifacts become the mean of the clean patches around them (SINDER, arXiv 2407.16826).

    Where the cache holds a share of the patches, it is the mean of all clean patches of the image. In an image without
    a clean patch, artifacts are clipped as by `clip`.
    """

    def patches(self, patches: Tensor) -> Tensor:
        """Replace artifacts among patch tokens (B, patches, d) by the mean of clean neighbours."""
        clean = clean_mask(patches.norm(dim=-1), self.threshold)
        expected = expected_patches(patches, clean, self.threshold, self.spec.grid)
        return torch.where(clean.unsqueeze(-1), patches, expected)


class NullSpaceProjector(Neighbour):
    """`projector`: artifacts move to the mean t of their clean neighbours, most where the final norm sees least.

    It has a closed form and needs no training: x' = x - (I + μC̃)⁻¹(x - t), C̃ = C·d/tr C, for tokens above the
    threshold. This minimises |x' - t|² + μ(x' - x)ᵀC̃(x' - x). Tokens that are still above the threshold then are
    scaled down to it.
    """

    needs_tokens = True
    move: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.register_buffer("move", torch.zeros(spec.width, spec.width))

    def fit(self, context: FitContext) -> None:
        """Set the threshold and (I + μC̃)⁻¹ from the block's curvature at the final norm."""
        super().fit(context)
        seen = curvature(context, "final-norm")
        d = len(seen)
        eye = torch.eye(d, dtype=seen.dtype, device=seen.device)
        scaled = seen * d / seen.diagonal().sum()
        self.move.copy_(torch.linalg.inv(eye + self.spec.softness * scaled))

    def patches(self, patches: Tensor) -> Tensor:
        """Move artifacts among patch tokens (B, patches, d) towards the mean of their clean neighbours."""
        return clip_norms(patches - (patches - super().patches(patches)) @ self.move, self.threshold)


class Adapter(Cleaner):
    """`adapter`: patch tokens become x + (x·down)·up (SiNGER). down (d, r), up (r, d)."""

    trained = True
    needs_suffix = True

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.down = nn.Parameter(torch.zeros(spec.width, spec.rank))
        self.up = nn.Parameter(torch.zeros(spec.rank, spec.width))

    @torch.no_grad()
    def start(self, directions: Tensor, scale: BlockScale, doubled: bool = False) -> None:
        """Start in the span of directions V (d, r), as the identity: down = V, up = 0.

        scale: of the block's original tokens; doubled: up = Vᵀ as in the paper, which doubles the component in that
        span, so that norms rise at first.
        """
        self.down.copy_(directions)
        self.up.copy_(directions.T) if doubled else self.up.zero_()

    def patches(self, patches: Tensor) -> Tensor:
        """Add the low-rank correction to patch tokens (B, patches, d)."""
        return patches + (patches @ self.down) @ self.up


class GatedAdapter(Adapter):
    """`gated-adapter`: artifacts become x + ((x - t)·down)·up, t the mean of their clean neighbours; the rest stays.

    The adapter of SiNGER behind a gate: a token moves only if its norm is above the threshold, and by what it has
    beyond the expected token t. In the span of `down`, where artifacts have their energy, an artifact becomes t; in
    all other directions it keeps what it has. Artifacts that are still above the threshold are scaled down to it.
    """

    needs_suffix = False
    threshold: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.register_buffer("threshold", torch.tensor(float("inf")))

    @torch.no_grad()
    def start(self, directions: Tensor, scale: BlockScale, doubled: bool = False) -> None:
        """Start as the projection on t in the span of directions V (d, r): down = V, up = -Vᵀ."""
        self.threshold.fill_(scale.threshold)
        self.down.copy_(directions)
        self.up.copy_(-directions.T)

    def patches(self, patches: Tensor) -> Tensor:
        """Move artifacts among patch tokens (B, patches, d)."""
        clean = clean_mask(patches.norm(dim=-1), self.threshold)
        excess = patches - expected_patches(patches, clean, self.threshold, self.spec.grid)
        moved = clip_norms(patches + (excess @ self.down) @ self.up, self.threshold)
        return torch.where(clean.unsqueeze(-1), patches, moved)


CLEANERS: dict[str, type[Cleaner]] = {
    "gated-adapter": GatedAdapter,
    "adapter": Adapter,
    "projector": NullSpaceProjector,
    "neighbour": Neighbour,
    "clip": Clip,
    "none": Cleaner,
}
