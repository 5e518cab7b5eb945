"""How much of the features a codec keeps: relative error and cosine, clean and artifact tokens apart."""

from typing import Any

import torch
from torch import Tensor

from pipeline.cache.codecs import Calibration, Codec
from singer.artifacts import clean_mask, norm_summary, patch_norms


def fidelity(codec: Codec, x: Tensor, calibration: Calibration) -> dict[str, Any]:
    """What `codec` makes of features x (n, N, d) of a block, and their norms."""
    decoded = codec.decode(codec.encode(x, calibration), calibration)
    return {"norms": norm_summary(patch_norms(x, calibration.prefix), calibration.threshold)} | compare(
        decoded, x, calibration.prefix, calibration.threshold
    )


def compare(decoded: Tensor, exact: Tensor, prefix: int, threshold: float) -> dict[str, dict[str, float] | None]:
    """{"prefix", "clean", "artifact": errors} of features (n, N, d); None where there is no such token.

    relative_error: root of the summed squared error over the summed squares; cosine: mean over tokens.
    """
    clean = clean_mask(patch_norms(exact, prefix), threshold)
    patches = decoded[:, prefix:], exact[:, prefix:]
    groups = {
        "prefix": (decoded[:, :prefix].flatten(0, 1), exact[:, :prefix].flatten(0, 1)),
        "clean": (patches[0][clean], patches[1][clean]),
        "artifact": (patches[0][~clean], patches[1][~clean]),
    }
    return {name: _errors(a.double(), b.double()) if len(b) else None for name, (a, b) in groups.items()}


def _errors(decoded: Tensor, exact: Tensor) -> dict[str, float]:
    scale = exact.norm().clamp_min(1e-30)
    cosine = torch.nn.functional.cosine_similarity(decoded, exact, dim=-1)
    # Two tokens of nothing but zeros agree.
    cosine = torch.where((decoded == exact).all(-1), 1.0, cosine)
    return {"relative_error": float((decoded - exact).norm() / scale), "cosine": float(cosine.mean())}
