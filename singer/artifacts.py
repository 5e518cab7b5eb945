"""Artifact tokens: patch tokens of abnormally high norm on raw block outputs (Darcet et al., arXiv 2309.16588)."""

import torch
from torch import Tensor

# The factor that makes the median absolute deviation estimate the standard deviation of a normal distribution.
MAD_TO_SIGMA = 1.4826


def robust_threshold(norms: Tensor, k: float) -> float:
    """median + k sigma of token norms, sigma from the median absolute deviation.

    Unlike a quantile per image, it punishes no clean image, and artifacts cannot move it while they are a minority.
    norms: any shape, of the original teacher features.
    """
    median = norms.float().median()
    sigma = MAD_TO_SIGMA * (norms.float() - median).abs().median()
    return float(median + k * sigma)


def patch_norms(tokens: Tensor, prefix: int) -> Tensor:
    """L2 norms (B, patches) of the patch tokens of (B, N, d)."""
    norms: Tensor = torch.linalg.vector_norm(tokens[:, prefix:].float(), dim=-1)
    return norms


def norm_summary(norms: Tensor, threshold: float) -> dict[str, float]:
    """Figures of a set of patch norms: median, p99 and max, max / median, share (%) above the threshold."""
    flat = norms.flatten().float()
    ordered = flat.sort().values
    median = float(ordered[len(ordered) // 2])
    p99 = float(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    return {
        "median": median,
        "p99": p99,
        "max": float(ordered[-1]),
        "max_over_median": float(ordered[-1]) / max(median, 1e-12),
        # A token clipped to the threshold is none, whatever its last bit.
        "artifact_percent": 100.0 * float((flat > threshold * (1 + 1e-5)).float().mean()),
    }


def clean_mask(norms: Tensor, threshold: float) -> Tensor:
    """True (B, N) where a token is no artifact."""
    clean: Tensor = norms <= threshold
    return clean
