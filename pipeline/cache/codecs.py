"""Encode features (n, N, d) as stored bytes, and decode them on the training device with a few torch operations.

A codec is a frozen instance with `parts`, `encode` and `decode`. A new codec is a new class or a new line in the
registry. A codec gets all that it knows about a block's features from the block's Calibration. Every part has the
record as its first axis. A fixed part is a tensor; a ragged part has one byte string per record. Bytes are
little-endian.

The quantised codecs take their levels from Lloyd (1982) and Max (1960). The rotation that makes channels Gaussian is
that of QuaRot (Ashkboos et al., arXiv 2404.00456). Outlier tokens are stored separately: an error of a few per cent of
an artifact token's norm is as large as a whole clean token, and a student would learn this error.
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

# These constants are a part of the format. If they were options, two caches with the same id could differ.
_CLEAN_SIGMAS = 6.0
# Channels are rotated in groups of this size. A full d x d matrix would cost 2 d² operations per token, which is 5 % or
# more of a small student's step. Groups of 16 are enough for clean tokens. Groups of 64 instead of 32 reduce the error
# of artifact tokens by a third.
_ROTATION_SIDE = 64
_ROTATION_SEED = 0
_NUMBERS_AT_ONCE = 1 << 20

# The positive half of the Lloyd-Max levels of a standard normal variable, by number of bits.
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (0.12839503, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571),
}


class Fixed(NamedTuple):
    """A part with the same size for every record: the shape of one record, and the dtype."""

    shape: tuple[int, ...]
    dtype: str


Layout = dict[str, Fixed | None]
"""{name of a part: its form}; None stands for a ragged part."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """One byte string per record, one after the other.

    data: (bytes,) uint8; lengths: (n,) int64, in bytes.
    """

    data: Tensor
    lengths: Tensor

    def to(self, device: torch.device | str) -> "Ragged":
        """Copy the data and the lengths to a device."""
        # The CPU reads a copy from a GPU at once, so that copy must be complete on return.
        asynchronous = self.data.device.type == "cpu"
        data = self.data.to(device, non_blocking=asynchronous)
        return Ragged(data, self.lengths.to(device, non_blocking=asynchronous))

    def split(self, counts: list[int]) -> list["Ragged"]:
        """Split the records into consecutive groups with `counts` records each."""
        lengths = self.lengths.split(counts)
        data = self.data.split([int(part.numpy().sum()) for part in lengths])
        return [Ragged(*part) for part in zip(data, lengths, strict=True)]

    @staticmethod
    def cat(parts: Sequence["Ragged"]) -> "Ragged":
        """Concatenate the records of several instances."""
        return Ragged(torch.cat([p.data for p in parts]), torch.cat([p.lengths for p in parts]))


Stored = dict[str, Tensor | Ragged]


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
        return Calibration.from_tensors({name: t.to(device) for name, t in self.tensors().items()})

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


class Codec(Protocol):
    """What a codec provides."""

    @property
    def name(self) -> str:
        """Return the name in the registry and in manifests."""

    @property
    def min_cosine(self) -> float:
        """Return the lowest mean cosine between decoded and live features that the codec alone can explain."""

    def parts(self, tokens: int, d: int) -> Layout:
        """Return the form of each stored part of a record with `tokens` tokens of d channels."""

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """Encode features (n, N, d), which are finite and on the calibration's device.

        The prefix tokens come first, then all patch tokens or some of them.
        """

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """Return features (n, N, d) float32 on the device of the parts; the calibration must be there too."""


@dataclass(frozen=True)
class Float:
    """Store 16-bit floats, 2 bytes per number.

    encode raises UserError if a number is out of range (float16: 65,504).
    """

    name: str
    dtype: torch.dtype
    stored: torch.dtype
    min_cosine: float

    def parts(self, tokens: int, d: int) -> Layout:
        """Return the form of `values`."""
        return {"values": Fixed((tokens, d), _name(self.stored))}

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """Convert x (n, N, d) to the dtype of the codec."""
        return {"values": _narrow(x, self.dtype, x).view(self.stored)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """Convert the values back to float32, (n, N, d)."""
        return _tensor(stored["values"]).view(self.dtype).float()


@dataclass(frozen=True)
class PlainInt8:
    """Standardise all tokens like clean patches; store 1 byte per number and one float16 scale per token.

    Format version 1 called this codec `int8`.
    """

    name: str
    min_cosine: float

    def parts(self, tokens: int, d: int) -> Layout:
        """Return the forms of `values` and `scale`."""
        return {"values": Fixed((tokens, d), "int8"), "scale": Fixed((tokens,), "float16")}

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """Quantise x (n, N, d) in uniform steps. Raises UserError if a scale is beyond float16."""
        codes, scale = _uniform((x.float() - calibration.mean) / calibration.std)
        return {"values": codes, "scale": _narrow(scale, torch.float16, x)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """Return features (n, N, d) float32."""
        standard = _tensor(stored["values"]).float().mul_(_tensor(stored["scale"]).float().unsqueeze(-1))
        return torch.addcmul(calibration.mean, standard, calibration.std)


@dataclass(frozen=True)
class Quantised:
    """Store `bits` bits per number and one float16 scale per token; store outlier tokens separately in float16.

    Tokens are standardised, prefix tokens by their own statistics. With 8 bits, the steps are uniform. With fewer bits,
    groups of channels are rotated and rounded to Lloyd-Max levels. `codes` holds the packed codes of each token, then
    its scale. `outliers` holds, for each outlier token, its uint16 position in the sequence, then d float16 numbers.
    encode raises UserError for an outlier that is beyond the range of float16.
    """

    name: str
    bits: int
    min_cosine: float
    outliers: bool = True

    def parts(self, tokens: int, d: int) -> Layout:
        """Return the forms of `codes` and, if they are stored, of `outliers`."""
        packed = sum(-(-d * bits // 8) for bits in _planes(self.bits))
        codes: Layout = {"codes": Fixed((tokens, packed + 2), "uint8")}
        return codes | {"outliers": None} if self.outliers else codes

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """Quantise x (n, N, d). Raises UserError if an outlier or a scale is beyond float16."""
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
        # The norms of prefix tokens differ from those of patches, so the threshold does not apply to them. A prefix
        # token is an outlier only if its scale is beyond float16.
        far = ~scale.to(torch.float16).isfinite()
        far[:, calibration.prefix :] |= ~clean_mask(patch_norms(x, calibration.prefix), calibration.threshold)
        scale = scale.masked_fill_(far, 0).to(torch.float16)
        codes = _with_scale(packed.masked_fill_(far.unsqueeze(-1), 0), scale)
        return {"codes": codes, "outliers": _pack_outliers(x, far)}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """Return features (n, N, d) float32."""
        stored_codes, d = _tensor(stored["codes"]), len(calibration.mean)
        packed = stored_codes[..., :-2]
        # The scales are copied because a view as float16 needs even strides.
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
        # These controls do not store outliers. Format version 1 called the first one int8.
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
    """Convert values, which were computed from features x, to dtype. Raises UserError if one is out of range."""
    values = values.to(dtype)
    # The minimum and the maximum are NaN if any number is. A check of every number takes ten times as long as the
    # conversion.
    if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        advice = "; use cache.codec bfloat16" if dtype == torch.float16 else ""
        raise UserError(f"features reach {float(x.abs().max()):.0f}, beyond {_name(dtype)}{advice}")
    return values


def _uniform(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (n, N, d) and float32 scales (n, N), which are float16 numbers if they are in its range.

    Overwrites `standard`.
    """
    # The scale is rounded up to a float16 above zero, so that the largest value of a token stays within 127 steps.
    scale = (standard.abs().amax(-1) / 127 * (1 + 2**-10)).clamp_min(2**-14).to(torch.float16).float()
    return standard.div_(scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale


def _standardise(x: Tensor, calibration: Calibration) -> Tensor:
    """Subtract the mean and divide by the std of each token; return (n, N, d) float32."""
    standard, prefix = torch.empty(x.shape, device=x.device), calibration.prefix
    torch.sub(x[:, :prefix], calibration.prefix_mean, out=standard[:, :prefix]).div_(calibration.prefix_std)
    torch.sub(x[:, prefix:], calibration.mean, out=standard[:, prefix:]).div_(calibration.std)
    return standard


def _lloyd_max(y: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return uint8 codes (n, N, d), with the sign bit above the magnitude, and least-squares scales (n, N).

    The tokens y are Gaussian. Each number is first rounded to float16, then to the nearest level: a table with 65,536
    entries is three times as fast as a search.
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
    """Return the code and the level of every float16 number, (65536,) uint8 and float32.

    The index is the number's bits, read as int16, plus 2**15.
    """
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()
    magnitudes = torch.tensor(levels)
    index = torch.bucketize(numbers.abs(), (magnitudes[1:] + magnitudes[:-1]) / 2)
    negative = numbers.signbit()
    codes = (index + len(levels) * negative).to(torch.uint8)
    return codes.to(device), magnitudes[index].where(~negative, -magnitudes[index]).to(device)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply every group of b channels of x (n, N, d) by the same (b, b) matrix."""
    rotated: Tensor = x.unflatten(-1, (-1, len(rotation))) @ rotation
    return rotated.flatten(-2)


def _planes(bits: int) -> tuple[int, ...]:
    """Return the bits of each plane in which codes are packed; a byte holds whole codes of one plane."""
    return (2, 1) if bits == 3 else (bits,)


def _plane_values(bits: int) -> tuple[tuple[float, ...], ...]:
    """Return, for each plane, the factor that each of its codes contributes to the level."""
    positive = LEVELS[bits]
    return (positive, (1.0, -1.0)) if bits == 3 else (positive + tuple(-v for v in positive),)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (..., d) into (..., bytes).

    A byte holds neighbouring channels, the first one in its lowest bits.
    """
    planes = []
    for width in _planes(bits):
        # View all codes that share a byte as one little-endian number, and collect them in its lowest byte.
        padded = F.pad(codes & (2**width - 1), (0, -codes.shape[-1] % (8 // width)))
        apart = padded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // width])
        together = apart.clone()
        for i in range(1, 8 // width):
            together |= apart >> i * (8 - width)
        planes.append(together.to(torch.uint8))
        codes = codes >> width
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def _unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """Unpack codes (n, N, bytes) into levels (n, N, d) float32."""
    widths = [-(-d * width // 8) for width in _planes(bits)]
    planes = [
        _lookup(plane, _table(values, packed.device))[..., :d]
        for plane, values in zip(packed.split(widths, -1), _plane_values(bits), strict=True)
    ]
    return planes[0] if len(planes) == 1 else planes[0].mul_(planes[1])


@lru_cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the values that each byte stands for, (256, codes per byte) float32."""
    width = (len(values) - 1).bit_length()
    shifts = torch.arange(0, 8, width)
    return torch.tensor(values)[torch.arange(256).unsqueeze(-1) >> shifts & (2**width - 1)].to(device)


def _lookup(packed: Tensor, table: Tensor) -> Tensor:
    """Look up each byte of (n, N, bytes) in a table (256, codes per byte); return (n, N, bytes x codes per byte)."""
    index = packed.int()
    if table.shape[1] == 2:
        # On a CPU, reading a pair as one complex number is three times as fast as reading a row of two numbers.
        pairs = torch.view_as_complex(table).index_select(0, index.flatten())
        return torch.view_as_real(pairs).view(*packed.shape[:-1], 2 * packed.shape[-1])
    return F.embedding(index, table).flatten(-2)


def _with_scale(packed: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([packed, scale.unsqueeze(-1).view(torch.uint8)], -1)


def _pack_outliers(x: Tensor, far: Tensor) -> Ragged:
    """Pack the positions and values of the tokens of x where `far` (n, N) is set."""
    values = _narrow(x[far], torch.float16, x).view(torch.int16)
    position = far.nonzero()[:, 1:].to(torch.int16)
    words = torch.cat([position, values], -1)
    return Ragged(words.view(torch.uint8).flatten(), far.sum(-1) * 2 * words.shape[1])


def _put_outliers(x: Tensor, outliers: Ragged) -> None:
    """Overwrite the outlier tokens of x."""
    if not outliers.data.numel():  # an empty tensor cannot be viewed as another dtype
        return
    words = outliers.data.view(torch.int16).view(-1, 1 + x.shape[-1])
    records = torch.arange(len(x), device=x.device)
    record = records.repeat_interleave(outliers.lengths // (2 * words.shape[1]), output_size=len(words))
    x[record, words[:, 0].long() & 0xFFFF] = words[:, 1:].view(torch.float16).float()
