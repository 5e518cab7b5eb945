"""The losses that fit the adapters on cached features (SiNGER, arXiv 2509.20986; two-stage form)."""

from torch import Tensor
from torch.nn import functional as F


def outlier_loss(norms: Tensor, threshold: float, scale: float) -> Tensor:
    """L_outlier: mean squared excess of patch norms (B, patches) over a fixed threshold.

    scale: the median clean norm; it makes the loss, and so its weight, independent of the teacher's units.
    """
    return ((norms - threshold).clamp_min(0) / scale).square().mean()


def cosine_gram(tokens: Tensor) -> Tensor:
    """Patch-to-patch cosine similarities (B, n, n) of tokens (B, n, d)."""
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


def info_loss(refined: Tensor, original: Tensor, clean: Tensor) -> Tensor:
    """L_info: mean squared difference of the cosine Grams of refined and original tokens (B, n, d).

    clean: (B, n), True where the ORIGINAL token is no artifact. Only pairs of clean tokens count: an artifact's
    similarities are what refinement is to change.
    """
    pairs = (clean.unsqueeze(1) & clean.unsqueeze(2)).to(refined.dtype)
    error = (cosine_gram(refined) - cosine_gram(original)).square() * pairs
    return error.sum() / pairs.sum().clamp_min(1)


def keep_loss(refined: Tensor, original: Tensor, clean: Tensor) -> Tensor:
    """Share of the variance of clean tokens (B, n, d), clean (B, n), that refinement changes; 0 is none.

    Not in the paper: the Gram of L_info is blind to rotations and to the length of tokens, so that adapters may
    drift far while it stays small. A shift common to all tokens is free; it says nothing about an image.
    """
    x = original[clean]
    change = refined[clean] - x
    variance = (x - x.mean(0)).square().sum().clamp_min(1e-12)
    return (change - change.mean(0)).square().sum() / variance
