"""Artifact tokens: patch tokens of abnormally high norm on raw block outputs (Darcet et al., arXiv 2309.16588)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# The factor that makes the median absolute deviation estimate the standard deviation of a normal distribution.
MAD_TO_SIGMA = 1.4826
# Sigma is at least this share of the median norm. Where most norms are equal the deviation is zero, and every token
# that differs at all would be an artifact. At every block of the real teacher sigma is 7 % or more (docs/refining.md).
_LEAST_SIGMA = 0.05
# Artifacts are a few percent of the tokens. A norm that a larger share of the tokens reaches is a common one.
_MOST_ARTIFACTS = 0.25


@dataclass(frozen=True)
class BlockScale:
    """Median norm of the patch tokens of a block, and the threshold above which a token is an artifact."""

    median: float
    threshold: float


def block_scale(norms: Tensor, k: float) -> BlockScale:
    """Compute the scale of a block from the patch norms of its ORIGINAL features (any shape)."""
    return BlockScale(float(norms.float().median()), robust_threshold(norms, k))


def robust_threshold(norms: Tensor, k: float) -> float:
    """Compute median + k sigma of token norms, sigma from the median absolute deviation.

    Unlike a quantile per image, it punishes no clean image, and artifacts cannot move it while they are a minority.
    sigma is at least a share of the median, and at most a quarter of the tokens are above the threshold, whatever their
    norms. norms: norms of the original teacher features, any shape.
    """
    flat = norms.flatten().float()
    median = flat.median()
    sigma = torch.maximum(MAD_TO_SIGMA * (flat - median).abs().median(), _LEAST_SIGMA * median)
    common = flat.kthvalue(math.ceil((1 - _MOST_ARTIFACTS) * len(flat))).values
    return float(torch.maximum(median + k * sigma, common))


def patch_norms(tokens: Tensor, prefix: int) -> Tensor:
    """Return the L2 norms (B, patches) of the patch tokens of (B, N, d)."""
    norms: Tensor = torch.linalg.vector_norm(tokens[:, prefix:].float(), dim=-1)
    return norms


def norm_summary(norms: Tensor, threshold: float) -> dict[str, float]:
    """Summarise patch norms: median, p99 and max, max / median, share (%) above the threshold."""
    flat = norms.flatten().float()
    ordered = flat.sort().values
    median = float(ordered[len(ordered) // 2])
    p99 = float(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    return {
        "median": median,
        "p99": p99,
        "max": float(ordered[-1]),
        "max_over_median": float(ordered[-1]) / max(median, 1e-12),
        # A token that was clipped to the threshold is not an artifact, even where rounding leaves it slightly above.
        "artifact_percent": 100.0 * float((flat > threshold * (1 + 1e-5)).float().mean()),
    }


def clean_mask(norms: Tensor, threshold: Tensor | float) -> Tensor:
    """Return True (B, N) where a token is not an artifact."""
    clean: Tensor = norms <= threshold
    return clean


def clip_norms(patches: Tensor, threshold: Tensor | float) -> Tensor:
    """Scale the patch tokens (B, n, d) above the threshold down to it."""
    norms = patches.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(patches.dtype).tiny)
    clipped: Tensor = patches * (threshold / norms).clamp_max(1)
    return clipped


def expected_patches(patches: Tensor, clean: Tensor, threshold: Tensor | float, grid: tuple[int, int] | None) -> Tensor:
    """Estimate each patch (B, n, d) from the clean ones (B, n): x̃ if the grid is whole, else their mean in the image.

    In an image without a clean patch, the estimate is the patch itself, scaled down to the threshold.
    """
    near = neighbour_mean(patches, clean, grid) if grid is not None else clean_mean(patches, clean).expand_as(patches)
    return torch.where(clean.any(1)[:, None, None], near, clip_norms(patches, threshold))


def clean_mean(patches: Tensor, clean: Tensor) -> Tensor:
    """Return the mean (B, 1, d) of the clean patches of every image; zero where there is none."""
    weight = clean.to(patches.dtype).unsqueeze(-1)
    mean: Tensor = (patches * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return mean


def neighbour_mean(patches: Tensor, clean: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute x̃ of SINDER (arXiv 2407.16826): the mean of the clean patches in the 3x3 neighbourhood, (B, n, d).

    patches (B, rows · columns, d); clean (B, n). Where no neighbour is clean, x̃ is the mean of the image's clean
    patches; where no patch of the image is clean, it is zero.
    """
    weight = clean.to(patches.dtype).unsqueeze(-1)
    maps = torch.cat([patches * weight, weight], dim=-1).transpose(1, 2).unflatten(2, grid)
    # divisor_override=1 gives sums, so that the border needs no case of its own.
    sums = F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1).flatten(2).transpose(1, 2)
    near, count = sums[..., :-1], sums[..., -1:]
    return torch.where(count > 0.5, near / count.clamp_min(1), clean_mean(patches, clean))
