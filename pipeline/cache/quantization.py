"""Measure the quantization error of codecs: relative error and cosine, separately for clean and artifact tokens."""

from typing import Any

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import Codec
from singer.artifacts import clean_mask, norm_summary, patch_norms


def quantization_errors(codec: Codec, x: Tensor, calibration: Calibration) -> dict[str, Any]:
    """Return the norms of a block's features x (n, N, d), and the errors of `codec` on them as `errors` names them."""
    sums = torch.zeros(3, 4, dtype=torch.float64)
    for few in few_records(x):
        decoded = codec.decode(codec.encode(few, calibration), calibration)
        sums += error_sums(decoded, few, calibration.prefix, calibration.threshold)
    return {"norms": norm_summary(patch_norms(x, calibration.prefix), calibration.threshold)} | errors(sums)


def error_sums(decoded: Tensor, exact: Tensor, prefix: int, threshold: float) -> Tensor:
    """Return the sums that `errors` needs, (3, 4) float64 on the CPU; sums of several batches can be added.

    decoded, exact: (n, N, d). Rows: prefix, clean and artifact tokens. Columns: squared error, squares, cosine, number
    of tokens.
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
    """Return {"prefix", "clean", "artifact": errors}; None where there is no such token.

    relative_error: the root of the summed squared error divided by the summed squares; cosine: the mean over tokens.
    """
    return {
        name: {"relative_error": (error / max(squares, 1e-60)) ** 0.5, "cosine": cosine / tokens} if tokens else None
        for name, (error, squares, cosine, tokens) in zip(("prefix", "clean", "artifact"), sums.tolist(), strict=True)
    }


def token_cosines(decoded: Tensor, exact: Tensor) -> Tensor:
    """Return the cosine (n, N) of each pair of tokens (n, N, d); equal tokens have cosine 1, even if all are zeros."""
    cosine = torch.nn.functional.cosine_similarity(decoded, exact, dim=-1)
    return cosine.masked_fill((decoded == exact).all(-1), 1.0)
