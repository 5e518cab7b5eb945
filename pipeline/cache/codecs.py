"""Codecs: how features (n, N, d) become stored arrays, and back on the training device with a few torch operations.

A codec is a frozen set of tensors (its calibration) with `parts`, `encode` and `decode`; a new one is a class and a
registry line. Every part keeps the record as its first axis.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Per-channel statistics of clean patch tokens of a block, from a fixed sample. mean, std: (d,) float32."""

    mean: Tensor
    std: Tensor


class Codec(Protocol):
    name: ClassVar[str]

    @staticmethod
    def parts(tokens: int, d: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """{part: (shape of one record, dtype)}."""
        ...

    @staticmethod
    def encode(x: Tensor, calibration: Calibration) -> dict[str, Tensor]: ...

    @staticmethod
    def decode(parts: Mapping[str, Tensor], calibration: Calibration) -> Tensor:
        """(n, N, d) float32 on the device of the parts; calibration must lie there too."""
        ...


class Float16:
    """`float16`: half precision; 2 bytes a number. encode raises ValueError beyond its range of 65,504."""

    name: ClassVar[str] = "float16"

    @staticmethod
    def parts(tokens: int, d: int) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"values": ((tokens, d), "float16")}

    @staticmethod
    def encode(x: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        values = x.to(torch.float16)
        if not torch.isfinite(values).all():
            raise ValueError(f"features reach {float(x.abs().max()):.0f}, beyond float16; use cache.codec int8")
        return {"values": values}

    @staticmethod
    def decode(parts: Mapping[str, Tensor], calibration: Calibration) -> Tensor:
        return parts["values"].float()


class Int8:
    """`int8`: channels standardised, then one float16 scale a token; 1 byte a number."""

    name: ClassVar[str] = "int8"

    @staticmethod
    def parts(tokens: int, d: int) -> dict[str, tuple[tuple[int, ...], str]]:
        return {"values": ((tokens, d), "int8"), "scale": ((tokens,), "float16")}

    @staticmethod
    def encode(x: Tensor, calibration: Calibration) -> dict[str, Tensor]:
        standard = (x.float() - calibration.mean) / calibration.std
        # Rounded up to a float16 above zero, so that the largest value of a token stays within 127 steps.
        scale = (standard.abs().amax(-1) / 127 * (1 + 2**-10)).clamp_min(2**-14).to(torch.float16)
        values = (standard / scale.float().unsqueeze(-1)).round().clamp_(-127, 127)
        return {"values": values.to(torch.int8), "scale": scale}

    @staticmethod
    def decode(parts: Mapping[str, Tensor], calibration: Calibration) -> Tensor:
        standard = parts["values"].float() * parts["scale"].float().unsqueeze(-1)
        return standard * calibration.std + calibration.mean


CODECS: dict[str, type[Codec]] = {c.name: c for c in (Float16, Int8)}
