"""What fits the gated adapter of a block: clean tokens get the excess of artifacts, and are the targets themselves.

Where an artifact is, nobody knows the token that should be there. Where a clean token is, it is known; so the excess
x - x̃ of artifacts of the same batch is added to some clean tokens, and the adapter is to find these again. x̃, the mean
of the clean neighbours, is one answer, with up = 0; the adapter learns what the corrupted token adds to it. The excess
of an artifact contains what a clean token there would differ by, so noise is rather over-estimated, and the adapter
returns rather too little.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from singer.artifacts import clean_mask, expected_patches
from singer.cleaners import replace_artifacts
from singer.fit_context import FitContext

# This share of the clean tokens is corrupted at a time, so that most of their neighbours remain.
_CORRUPTED = 1 / 8
# Directions are found by so many draws of corrupted tokens.
_DRAWS = 4
# rank=auto takes as many directions as hold this share of what can be gained, but no more than _WIDEST.
_GAIN = 0.9
_WIDEST = 64


@dataclass(frozen=True)
class Corrupted:
    """Corrupted tokens (M, d), what their clean neighbours let expect (M, d), and the clean tokens themselves (M, d)."""

    tokens: Tensor
    expected: Tensor
    target: Tensor


@dataclass(frozen=True)
class DenoisingStart:
    """Where the adapter of a block starts: down (d, r), and the directions of artifacts (d, k), orthonormal."""

    down: Tensor
    artifact: Tensor

    def keep_off(self, x: Tensor) -> Tensor:
        """Project vectors (d, r) into the null space of artifact energy."""
        return x - self.artifact @ (self.artifact.T @ x)


def corrupt(
    patches: Tensor, threshold: float, grid: tuple[int, int] | None, generator: torch.Generator
) -> Corrupted | None:
    """Add the excess of artifacts among patch tokens (B, n, d) to some clean ones, both drawn by the generator.

    Tokens that are not above the threshold then are left out, since the gate would not open for them. Return None if
    none is left, for example because there is no artifact.
    """
    clean = clean_mask(patches.norm(dim=-1), threshold)
    excess = (patches - expected_patches(patches, threshold, grid))[~clean]
    # They are drawn on the generator's device, so that every device draws the same.
    chosen = clean & (torch.rand(clean.shape, generator=generator) < _CORRUPTED).to(clean.device)
    if not len(excess) or not bool(chosen.any()):
        return None
    drawn = torch.randint(len(excess), (int(chosen.sum()),), generator=generator).to(excess.device)
    noisy = patches.clone()
    noisy[chosen] += excess[drawn]
    gated = chosen & ~clean_mask(noisy.norm(dim=-1), threshold)
    if not bool(gated.any()):
        return None
    return Corrupted(noisy[gated], expected_patches(noisy, threshold, grid)[gated], patches[gated])


def denoising_loss(corrupted: Corrupted, down: Tensor, up: Tensor, threshold: float) -> Tensor:
    """Return the squared error of the denoised tokens, divided by that of x̃ alone: 1 is as good as `neighbour`."""
    found = replace_artifacts(corrupted.tokens, corrupted.expected, down, up, threshold)
    alone = (corrupted.expected - corrupted.target).square().sum()
    return (found - corrupted.target).square().sum() / alone.clamp_min(1e-30)


def denoising_start(context: FitContext, rank: int | None) -> DenoisingStart | None:
    """Find the null space of artifact energy, and in it the directions with most to gain; None without artifacts.

    A direction of artifacts is one of A (FitContext.artifact_energy) with more energy than clean tokens vary by in any
    direction. In the null space, with y the excess of corrupted tokens and r what their clean ones differ by from x̃,
    the best linear answer is y·W, W = E[yyᵀ]⁻¹E[yrᵀ]; `down` is W in the span of the top eigenvectors of WᵀE[yyᵀ]W
    (reduced-rank regression). rank: number of directions; None: as many as hold most of the gain.
    """
    generator = context.generator()
    drawn = [corrupt(context.patches, context.scale.threshold, context.grid, generator) for _ in range(_DRAWS)]
    found = [c for c in drawn if c is not None]
    if not found:
        return None
    excess = torch.cat([c.tokens - c.expected for c in found]).double()
    missing = torch.cat([c.target - c.expected for c in found]).double()
    artifact = artifact_directions(context.artifact_energy(), missing)
    excess = excess - excess @ artifact @ artifact.T
    energy, cross = excess.T @ excess / len(excess), excess.T @ missing / len(excess)
    eye = torch.eye(len(energy), dtype=energy.dtype, device=energy.device)
    answer = torch.linalg.solve(energy + 1e-6 * energy.diagonal().mean().clamp_min(1e-30) * eye, cross)
    gains, vectors = torch.linalg.eigh(answer.T @ energy @ answer)  # ascending
    gains, vectors = gains.flip(0).clamp_min(0), vectors.flip(1)
    if rank is None:
        held = gains.cumsum(0) / gains.sum().clamp_min(1e-30)
        rank = min(_WIDEST, 1 + int((held < _GAIN).sum()), len(gains))
    start = DenoisingStart((answer @ vectors[:, :rank]).float(), artifact.float())
    return DenoisingStart(start.keep_off(start.down).contiguous(), start.artifact)


def artifact_directions(energy: Tensor, missing: Tensor) -> Tensor:
    """Return the eigenvectors (d, k) of artifact energy (d, d) above the largest variance of `missing` (M, d)."""
    usual = torch.linalg.eigvalsh(missing.T @ missing / len(missing))[-1]
    values, vectors = torch.linalg.eigh(energy)
    directions: Tensor = vectors[:, values > usual]
    return directions
