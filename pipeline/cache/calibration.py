"""What codecs know about a block of a teacher, measured on a fixed sample of its features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from singer.artifacts import clean_mask, patch_norms, robust_threshold

# These constants are a part of the format. If they were options, two caches with the same id could differ.
_CLEAN_SIGMAS = 6.0
# Channels are rotated in groups of this size. A full d x d matrix would cost 2 d² operations per token, which is 5 % or
# more of a small student's step. Groups of 16 are enough for clean tokens. Groups of 64 instead of 32 reduce the error
# of artifact tokens by a third.
_ROTATION_SIDE = 64
_ROTATION_SEED = 0
_NUMBERS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Calibration:
    """What codecs know about a block, measured on a fixed sample. All tensors are float32.

    mean, std: (d,), of clean patch tokens; prefix_mean, prefix_std: (P, d), of each prefix token (class token,
    registers); threshold: the norm above which a patch token is an outlier; rotation: (b, b), orthogonal, where b
    divides d.
    """

    mean: Tensor
    std: Tensor
    prefix_mean: Tensor
    prefix_std: Tensor
    threshold: float
    rotation: Tensor

    @property
    def prefix(self) -> int:
        """Return the number of prefix tokens."""
        return len(self.prefix_mean)

    def tensors(self) -> dict[str, Tensor]:
        """Return all values as tensors; the threshold is a float64 scalar."""
        return vars(self) | {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build an instance from what `tensors` returned. Raises KeyError if a tensor is missing."""
        mean, std = tensors["mean"], tensors["std"]
        threshold = float(tensors["threshold"])
        return cls(mean, std, tensors["prefix_mean"], tensors["prefix_std"], threshold, tensors["rotation"])

    def to(self, device: torch.device | str) -> "Calibration":
        """Copy all tensors to a device."""
        moved: dict[str, Any] = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    def by_token(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the std for every token of a record, (N, d) each."""
        rows = tokens - self.prefix
        return (
            torch.cat([self.prefix_mean, self.mean.expand(rows, -1)]),
            torch.cat([self.prefix_std, self.std.expand(rows, -1)]),
        )


def few_records(x: Tensor) -> tuple[Tensor, ...]:
    """Split features (n, N, d) into parts of whole records, so that what is computed from one part fits a CPU's cache.

    On other devices there is one part.
    """
    few = max(1, _NUMBERS_AT_ONCE // max(1, math.prod(x.shape[1:]))) if x.device.type == "cpu" else max(1, len(x))
    parts: tuple[Tensor, ...] = x.split(few)
    return parts


def calibrate(x: Tensor, prefix: int) -> Calibration:
    """Measure the calibration of a block on the features of a sample.

    x: (n, N, d) float32, with `prefix` tokens before the patches.
    """
    norms = patch_norms(x, prefix)
    threshold = robust_threshold(norms, _CLEAN_SIGMAS)
    mean, std = _statistics(x[:, prefix:][clean_mask(norms, threshold)])
    prefix_mean, prefix_std = _statistics(x[:, :prefix])
    # The std of a channel that never varies is zero, and codecs divide by the std.
    floor = 1e-3 * float(std.mean()) + 1e-12
    rotation = _rotation(x.shape[-1]).to(x.device)
    return Calibration(
        mean.float(), std.clamp_min(floor).float(), prefix_mean.float(), prefix_std.clamp_min(floor).float(),
        threshold, rotation,
    )  # fmt: skip


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the std over the first axis, in float64."""
    mean = x.double().mean(0)
    return mean, (x - mean).square().mean(0).sqrt()


def _rotation(d: int) -> Tensor:
    """Return a random orthogonal matrix with the largest side that divides d and is at most _ROTATION_SIDE."""
    side = max(b for b in range(1, _ROTATION_SIDE + 1) if d % b == 0)
    q, r = torch.linalg.qr(torch.randn(side, side, generator=torch.Generator().manual_seed(_ROTATION_SEED)))
    rotation: Tensor = (q * r.diagonal().sign()).contiguous()
    return rotation
