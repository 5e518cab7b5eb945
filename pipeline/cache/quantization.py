"""How much of the features a codec keeps: relative error and cosine, clean and artifact tokens apart."""

from typing import Any

import torch
from torch import Tensor

from pipeline.cache.codecs import Calibration, Codec, few_records
from singer.artifacts import clean_mask, norm_summary, patch_norms


def fidelity(codec: Codec, x: Tensor, calibration: Calibration) -> dict[str, Any]:
    """What `codec` makes of features x (n, N, d) of a block, and their norms."""
    sums = torch.zeros(3, 4, dtype=torch.float64)
    for few in few_records(x):
        decoded = codec.decode(codec.encode(few, calibration), calibration)
        sums += error_sums(decoded, few, calibration.prefix, calibration.threshold)
    return {"norms": norm_summary(patch_norms(x, calibration.prefix), calibration.threshold)} | errors(sums)


def error_sums(decoded: Tensor, exact: Tensor, prefix: int, threshold: float) -> Tensor:
    """What `errors` needs of features (n, N, d): (3, 4) float64 on the CPU, to be added up over batches.

    Rows: prefix, clean and artifact tokens. Columns: squared error, squares, cosine, tokens.
    """
    clean = clean_mask(patch_norms(exact, prefix), threshold)
    groups = torch.zeros(3, *exact.shape[:2], dtype=torch.float64, device=exact.device)
    groups[0, :, :prefix] = 1
    groups[1, :, prefix:] = clean.double()
    groups[2, :, prefix:] = (~clean).double()
    error = (decoded - exact).square().sum(-1, dtype=torch.float64)
    squares = exact.square().sum(-1, dtype=torch.float64)
    columns = torch.stack([error, squares, token_cosines(decoded, exact).double(), torch.ones_like(error)])
    return torch.einsum("gnt,cnt->gc", groups, columns).cpu()


def errors(sums: Tensor) -> dict[str, dict[str, float] | None]:
    """{"prefix", "clean", "artifact": errors}; None where there is no such token.

    relative_error: root of the summed squared error over the summed squares; cosine: mean over tokens.
    """
    return {
        name: {"relative_error": (error / max(squares, 1e-60)) ** 0.5, "cosine": cosine / tokens} if tokens else None
        for name, (error, squares, cosine, tokens) in zip(("prefix", "clean", "artifact"), sums.tolist(), strict=True)
    }


def token_cosines(decoded: Tensor, exact: Tensor) -> Tensor:
    """(n, N) of features (n, N, d); two tokens of nothing but zeros agree."""
    cosine = torch.nn.functional.cosine_similarity(decoded, exact, dim=-1)
    return cosine.masked_fill((decoded == exact).all(-1), 1.0)
