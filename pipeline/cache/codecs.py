"""Codecs: how features (n, N, d) become stored bytes, and back on the training device with a few torch operations.

A codec is a frozen instance with `parts`, `encode` and `decode`; a new one is a class or a line of the registry. What
it knows of a block's features is the block's Calibration. Every part keeps the record as its first axis: a fixed part
is a tensor, a ragged one a byte string a record. Bytes are little-endian.

The quantised codecs follow Lloyd (1982) and Max (1960) for the levels, QuaRot (Ashkboos et al., arXiv 2404.00456) for
the rotation that makes channels Gaussian, and keep outlier tokens apart: a few per cent of an artifact token's norm is
as large as a whole clean token, and a student copies it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.artifacts import clean_mask, patch_norms, robust_threshold
from singer.errors import UserError

# Part of the format: were these options, two caches of one id could differ.
_CLEAN_SIGMAS = 6.0
# Channels are rotated in blocks: a full d x d matrix would cost 2 d² operations a token, 5 % and more of a small
# student's step, and 16 are enough for clean tokens; 64 rather than 32 take a third off the error of artifact tokens.
_ROTATION_SIDE = 64
_ROTATION_SEED = 0
_NUMBERS_AT_ONCE = 1 << 20

# Positive half of the Lloyd-Max levels of a standard normal variable, by bits.
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (0.12839503, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571),
}


class Fixed(NamedTuple):
    """A part of one size: shape of one record and dtype."""

    shape: tuple[int, ...]
    dtype: str


Layout = dict[str, Fixed | None]
"""{part: its form}; None is a ragged part."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """One byte string a record, one behind the other. data: (bytes,) uint8; lengths: (n,) int64 bytes."""

    data: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> "Ragged":
        # What comes from a GPU is read at once, and must be there.
        later = self.data.device.type == "cpu"
        return Ragged(self.data.to(device, non_blocking=later), self.lengths.to(device, non_blocking=later))

    def split(self, counts: list[int]) -> list["Ragged"]:
        """In parts of so many records."""
        lengths = self.lengths.split(counts)
        data = self.data.split([int(part.numpy().sum()) for part in lengths])
        return [Ragged(*part) for part in zip(data, lengths, strict=True)]

    @staticmethod
    def cat(parts: Sequence["Ragged"]) -> "Ragged":
        return Ragged(torch.cat([p.data for p in parts]), torch.cat([p.lengths for p in parts]))


Stored = dict[str, Tensor | Ragged]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What codecs know of a block, from a fixed sample; all float32.

    mean, std: (d,) of clean patch tokens; prefix_mean, prefix_std: (P, d) of each prefix token (class token,
    registers); threshold: norm above which a patch token is an outlier; rotation: (b, b) orthogonal, b divides d.
    """

    mean: Tensor
    std: Tensor
    prefix_mean: Tensor
    prefix_std: Tensor
    threshold: float
    rotation: Tensor

    @property
    def prefix(self) -> int:
        return len(self.prefix_mean)

    def tensors(self) -> dict[str, Tensor]:
        return vars(self) | {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Raises KeyError if one is missing."""
        mean, std = tensors["mean"], tensors["std"]
        threshold = float(tensors["threshold"])
        return cls(mean, std, tensors["prefix_mean"], tensors["prefix_std"], threshold, tensors["rotation"])

    def to(self, device: torch.device | str) -> "Calibration":
        return Calibration.from_tensors({name: t.to(device) for name, t in self.tensors().items()})

    def by_token(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Mean and std of every token of a record, (N, d) each."""
        rows = tokens - self.prefix
        return (
            torch.cat([self.prefix_mean, self.mean.expand(rows, -1)]),
            torch.cat([self.prefix_std, self.std.expand(rows, -1)]),
        )


def few_records(x: Tensor) -> tuple[Tensor, ...]:
    """Features (n, N, d) in parts of whole records: what is computed of a few of them stays in a CPU's cache."""
    few = max(1, _NUMBERS_AT_ONCE // max(1, math.prod(x.shape[1:]))) if x.device.type == "cpu" else max(1, len(x))
    parts: tuple[Tensor, ...] = x.split(few)
    return parts


def calibrate(x: Tensor, prefix: int) -> Calibration:
    """x: (n, N, d) float32, features of the sample, with `prefix` tokens ahead of the patches."""
    norms = patch_norms(x, prefix)
    threshold = robust_threshold(norms, _CLEAN_SIGMAS)
    mean, std = _statistics(x[:, prefix:][clean_mask(norms, threshold)])
    prefix_mean, prefix_std = _statistics(x[:, :prefix])
    # A channel that never varies would divide by zero.
    floor = 1e-3 * float(std.mean()) + 1e-12
    rotation = _rotation(x.shape[-1]).to(x.device)
    return Calibration(
        mean.float(), std.clamp_min(floor).float(), prefix_mean.float(), prefix_std.clamp_min(floor).float(),
        threshold, rotation,
    )  # fmt: skip


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std over the first axis, in float64."""
    mean = x.double().mean(0)
    return mean, (x - mean).square().mean(0).sqrt()


def _rotation(d: int) -> Tensor:
    """Random orthogonal matrix; its side is the largest divisor of d within the limit."""
    side = max(b for b in range(1, _ROTATION_SIDE + 1) if d % b == 0)
    q, r = torch.linalg.qr(torch.randn(side, side, generator=torch.Generator().manual_seed(_ROTATION_SEED)))
    rotation: Tensor = (q * r.diagonal().sign()).contiguous()
    return rotation


class Codec(Protocol):
    """min_cosine: mean cosine of decoded against live features below which something else than the codec is wrong."""

    @property
    def name(self) -> str: ...

    @property
    def min_cosine(self) -> float: ...

    def parts(self, tokens: int, d: int) -> Layout: ...

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """x: (n, N, d) finite, on the calibration's device, prefix tokens first, then any of the patch tokens."""
        ...

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """(n, N, d) float32 on the device of the parts; the calibration must lie there too."""
        ...


@dataclass(frozen=True)
class Float:
    """A 16-bit float; 2 bytes a number. encode raises UserError beyond its range (float16: 65,504)."""

    name: str
    dtype: torch.dtype
    stored: torch.dtype
    min_cosine: float

    def parts(self, tokens: int, d: int) -> Layout:
        return {"values": Fixed((tokens, d), _name(self.stored))}

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        return {"values": _narrow(x, self.dtype, x).view(self.stored)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        return _tensor(stored["values"]).view(self.dtype).float()


@dataclass(frozen=True)
class PlainInt8:
    """All tokens standardised like clean patches, one float16 scale a token; 1 byte a number. Version 1's `int8`."""

    name: str
    min_cosine: float

    def parts(self, tokens: int, d: int) -> Layout:
        return {"values": Fixed((tokens, d), "int8"), "scale": Fixed((tokens,), "float16")}

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        codes, scale = _uniform((x.float() - calibration.mean) / calibration.std)
        return {"values": codes, "scale": _narrow(scale, torch.float16, x)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        standard = _tensor(stored["values"]).float().mul_(_tensor(stored["scale"]).float().unsqueeze(-1))
        return torch.addcmul(calibration.mean, standard, calibration.std)


@dataclass(frozen=True)
class Quantised:
    """`bits` a number, one float16 scale a token; outlier tokens apart in float16.

    Tokens are standardised, prefix tokens by their own statistics. 8 bits: uniform steps. Fewer: blocks of channels are
    rotated and rounded to Lloyd-Max levels. `codes`: each token's packed codes, then its scale. `outliers`: for each
    outlier token its uint16 position in the sequence, then d float16. encode raises UserError for an outlier beyond
    float16's range.
    """

    name: str
    bits: int
    min_cosine: float
    outliers: bool = True

    def parts(self, tokens: int, d: int) -> Layout:
        packed = sum(-(-d * bits // 8) for bits in _planes(self.bits))
        codes: Layout = {"codes": Fixed((tokens, packed + 2), "uint8")}
        return codes | {"outliers": None} if self.outliers else codes

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        assert x.shape[1] <= 2**16, "positions are uint16"
        standard = _standardise(x, calibration)
        if self.bits == 8:
            signed, scale = _uniform(standard)
            packed = signed.view(torch.uint8)
        else:
            codes, scale = _lloyd_max(_rotate(standard, calibration.rotation), LEVELS[self.bits])
            packed = _pack(codes, self.bits)
        if not self.outliers:
            return {"codes": _with_scale(packed, _narrow(scale, torch.float16, x))}
        # A prefix token is none by its norm, which is its own; only if not even a scale can hold it.
        far = ~scale.to(torch.float16).isfinite()
        far[:, calibration.prefix :] |= ~clean_mask(patch_norms(x, calibration.prefix), calibration.threshold)
        scale = scale.masked_fill_(far, 0).to(torch.float16)
        codes = _with_scale(packed.masked_fill_(far.unsqueeze(-1), 0), scale)
        return {"codes": codes, "outliers": _pack_outliers(x, far)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        stored_codes, d = _tensor(stored["codes"]), len(calibration.mean)
        packed = stored_codes[..., :-2]
        # A copy, since a view as float16 wants even strides.
        scale = stored_codes[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        if self.bits == 8:
            standard = packed.view(torch.int8).float().mul_(scale)
        else:
            standard = _rotate(_unpack(packed, self.bits, d).mul_(scale), calibration.rotation.T)
        mean, std = calibration.by_token(packed.shape[1])
        x = torch.addcmul(mean, standard, std, out=standard)
        if self.outliers:
            outliers = stored["outliers"]
            assert isinstance(outliers, Ragged)
            _put_outliers(x, outliers)
        return x


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Float("float16", torch.float16, torch.float16, min_cosine=0.999),
        Float("bfloat16", torch.bfloat16, torch.uint16, min_cosine=0.999),
        Quantised("int8", 8, min_cosine=0.999),
        Quantised("int4", 4, min_cosine=0.99),
        Quantised("int3", 3, min_cosine=0.965),
        Quantised("int2", 2, min_cosine=0.88),
        Quantised("int1", 1, min_cosine=0.7),
        # Controls without outliers; version 1 called the first one int8.
        PlainInt8("int8-plain", min_cosine=0.999),
        Quantised("int4-plain", 4, min_cosine=0.99, outliers=False),
    )
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(part: Tensor | Ragged) -> Tensor:
    assert isinstance(part, Tensor)
    return part


def _narrow(values: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
    """Raises UserError if values, made from features x, leave the range of dtype."""
    values = values.to(dtype)
    # Least and largest are NaN where any is; looking at every number takes ten times as long as making it.
    if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        advice = "; use cache.codec bfloat16" if dtype == torch.float16 else ""
        raise UserError(f"features reach {float(x.abs().max()):.0f}, beyond {_name(dtype)}{advice}")
    return values


def _uniform(standard: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, N, d) and float32 scales (n, N) that are float16 numbers if they are in its range.

    Overwrites `standard`.
    """
    # Rounded up to a float16 above zero, so that the largest value of a token stays within 127 steps.
    scale = (standard.abs().amax(-1) / 127 * (1 + 2**-10)).clamp_min(2**-14).to(torch.float16).float()
    return standard.div_(scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale


def _standardise(x: Tensor, calibration: Calibration) -> Tensor:
    """(n, N, d) float32."""
    standard, prefix = torch.empty(x.shape, device=x.device), calibration.prefix
    torch.sub(x[:, :prefix], calibration.prefix_mean, out=standard[:, :prefix]).div_(calibration.prefix_std)
    torch.sub(x[:, prefix:], calibration.mean, out=standard[:, prefix:]).div_(calibration.std)
    return standard


def _lloyd_max(y: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """uint8 codes (n, N, d), sign above magnitude, and least-squares scales (n, N) of Gaussian tokens.

    The level is the nearest to the float16 number: 65,536 answers in a table are read three times as fast as found.
    """
    codes, nearest = _rounded(levels, y.device)
    rms = y.square().mean(-1, keepdim=True).sqrt_().clamp_min_(torch.finfo(y.dtype).tiny)
    relative = y / rms
    bits = relative.half().view(torch.int16).flatten().int().add_(2**15)
    level = torch.index_select(nearest, 0, bits, out=relative.view(-1)).view_as(y)
    norm = level.square().sum(-1)
    return codes.index_select(0, bits).view(y.shape), level.mul_(y).sum(-1) / norm


@lru_cache
def _rounded(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Code and level of every float16 number, (65536,) uint8 and float32, by its bits as int16 and 2**15 more."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    magnitudes = torch.tensor(levels)
    index = torch.bucketize(numbers.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    negative = numbers.signbit()
    codes = (index + len(levels) * negative).to(torch.uint8)
    return codes.to(device), magnitudes[index].where(~negative, -magnitudes[index]).to(device)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Every block of b channels of (n, N, d) by the same (b, b) matrix."""
    rotated: Tensor = x.unflatten(-1, (-1, len(rotation))) @ rotation
    return rotated.flatten(-2)


def _planes(bits: int) -> tuple[int, ...]:
    """Bits of each plane in which codes are packed: a byte holds whole codes of a plane."""
    return (2, 1) if bits == 3 else (bits,)


def _plane_values(bits: int) -> tuple[tuple[float, ...], ...]:
    """For each plane, the factor that each of its codes contributes to the level."""
    positive = LEVELS[bits]
    return (positive, (1.0, -1.0)) if bits == 3 else (positive + tuple(-v for v in positive),)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(..., d) uint8 codes -> (..., bytes); a byte holds neighbouring channels, the first in its lowest bits."""
    planes = []
    for width in _planes(bits):
        # All codes of a byte as one little-endian number, in whose lowest byte they are brought together.
        padded = F.pad(codes & (2**width - 1), (0, -codes.shape[-1] % (8 // width)))
        apart = padded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // width])
        together = apart.clone()
        for i in range(1, 8 // width):
            together |= apart >> i * (8 - width)
        planes.append(together.to(torch.uint8))
        codes = codes >> width
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def _unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """(n, N, bytes) -> levels (n, N, d) float32."""
    widths = [-(-d * width // 8) for width in _planes(bits)]
    planes = [
        _lookup(plane, _table(values, packed.device))[..., :d]
        for plane, values in zip(packed.split(widths, -1), _plane_values(bits), strict=True)
    ]
    return planes[0] if len(planes) == 1 else planes[0].mul_(planes[1])


@lru_cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(256, codes a byte) float32: what each byte stands for."""
    width = (len(values) - 1).bit_length()
    shifts = torch.arange(0, 8, width)
    return torch.tensor(values)[torch.arange(256).unsqueeze(-1) >> shifts & (2**width - 1)].to(device)


def _lookup(packed: Tensor, table: Tensor) -> Tensor:
    """(n, N, bytes) -> (n, N, bytes x codes a byte) by a table (256, codes a byte)."""
    index = packed.int()
    if table.shape[1] == 2:
        # As one complex number a byte, a pair is read three times as fast as a row of two on a CPU.
        pairs = torch.view_as_complex(table).index_select(0, index.flatten())
        return torch.view_as_real(pairs).view(*packed.shape[:-1], 2 * packed.shape[-1])
    return F.embedding(index, table).flatten(-2)


def _with_scale(packed: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([packed, scale.unsqueeze(-1).view(torch.uint8)], -1)


def _pack_outliers(x: Tensor, far: Tensor) -> Ragged:
    """The tokens of x where `far` (n, N) is set."""
    values = _narrow(x[far], torch.float16, x).view(torch.int16)
    position = far.nonzero()[:, 1:].to(torch.int16)
    words = torch.cat([position, values], -1)
    return Ragged(words.view(torch.uint8).flatten(), far.sum(-1) * 2 * words.shape[1])


def _put_outliers(x: Tensor, outliers: Ragged) -> None:
    """Overwrite the outlier tokens of x."""
    if not outliers.data.numel():  # nothing has no strides to be viewed by
        return
    words = outliers.data.view(torch.int16).view(-1, 1 + x.shape[-1])
    records = torch.arange(len(x), device=x.device)
    record = records.repeat_interleave(outliers.lengths // (2 * words.shape[1]), output_size=len(words))
    x[record, words[:, 0].long() & 0xFFFF] = words[:, 1:].view(torch.float16).float()
