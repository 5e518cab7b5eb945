"""Encode features (n, N, d) as stored bytes, and decode them on the training device with a few torch operations.

A codec is a frozen instance with `parts`, `encode` and `decode`. A new codec is a new class or a new line in the
registry. A codec gets all that it knows about a block's features from the block's Calibration. Every part has the
record as its first axis. A fixed part is a tensor; a ragged part has one byte string per record. Bytes are
little-endian.

Outlier tokens are stored separately: an error of a few per cent of an artifact token's norm is as large as a whole
clean token, and a student would learn this error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration
from pipeline.cache.packing import LEVELS, lloyd_max, load_tables, pack, plane_bits, rotate, unpack
from pipeline.cache.stored import Decoded, Encoded, Fixed, Layout, Ragged, Stored
from singer.artifacts import clean_mask, patch_norms
from singer.errors import UserError


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

    It is a control: outliers are not stored beside.
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
        packed = sum(-(-d * bits // 8) for bits in plane_bits(self.bits))
        codes: Layout = {"codes": Fixed((tokens, packed + 2), "uint8")}
        return codes | {"outliers": None} if self.outliers else codes

    def encode(self, x: Tensor, calibration: Calibration) -> Stored:
        """Quantise x (n, N, d). Raises UserError if an outlier or a scale is beyond float16."""
        assert x.shape[1] <= 2**16, "positions are uint16"
        # Each token is standardised by its own mean and std, in memory that the codes may overwrite.
        standard, prefix = torch.empty(x.shape, device=x.device), calibration.prefix
        torch.sub(x[:, :prefix], calibration.prefix_mean, out=standard[:, :prefix]).div_(calibration.prefix_std)
        torch.sub(x[:, prefix:], calibration.mean, out=standard[:, prefix:]).div_(calibration.std)
        if self.bits == 8:
            signed, scale = _uniform(standard)
            packed = signed.view(torch.uint8)
        else:
            codes, scale = lloyd_max(rotate(standard, calibration.rotation), LEVELS[self.bits])
            packed = pack(codes, self.bits)
        apart: Stored = {}
        if self.outliers:
            # The norms of prefix tokens differ from those of patches, so the threshold does not apply to them. A prefix
            # token is an outlier only if its scale is beyond float16.
            far = ~scale.to(torch.float16).isfinite()
            far[:, prefix:] |= ~clean_mask(patch_norms(x, prefix), calibration.threshold)
            scale = scale.masked_fill_(far, 0).to(torch.float16)
            packed.masked_fill_(far.unsqueeze(-1), 0)
            apart["outliers"] = _pack_outliers(x, far)
        else:
            scale = _narrow(scale, torch.float16, x)
        return {"codes": torch.cat([packed, scale.unsqueeze(-1).view(torch.uint8)], -1), **apart}

    def decode(self, stored: Mapping[str, Tensor | Ragged], calibration: Calibration) -> Tensor:
        """Return features (n, N, d) float32."""
        stored_codes, d = stored["codes"], len(calibration.mean)
        assert isinstance(stored_codes, Tensor)
        packed = stored_codes[..., :-2]
        # The scales are copied because a view as float16 needs even strides.
        scale = stored_codes[..., -2:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
        if self.bits == 8:
            standard = packed.view(torch.int8).float().mul_(scale)
        else:
            standard = rotate(unpack(packed, self.bits, d).mul_(scale), calibration.rotation.T)
        mean, std = calibration.by_token(packed.shape[1])
        x = torch.addcmul(mean, standard, std, out=standard)
        if self.outliers:
            outliers = stored["outliers"]
            assert isinstance(outliers, Ragged)
            _put_outliers(x, outliers)
        return x


@contextmanager
def naming_block(block: int) -> Iterator[None]:
    """Put the block before the message of a UserError of a codec."""
    try:
        yield
    except UserError as error:
        raise UserError(f"block {block}: {error}") from None


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
        # These controls do not store outliers.
        PlainInt8("int8-plain", min_cosine=0.999),
        Quantised("int4-plain", 4, min_cosine=0.99, outliers=False),
    )
}


@dataclass(frozen=True, eq=False)
class Decoder:
    """A codec with the calibration of each block, {block: calibration}, on one device."""

    codec: Codec
    calibration: Mapping[int, Calibration]

    def __post_init__(self) -> None:
        for calibration in self.calibration.values():
            load_tables(calibration.mean.device)

    def __call__(self, encoded: Encoded | Decoded) -> Decoded:
        """Decode records that are on the device, in float32 also within a step of mixed precision.

        Decoded ones are returned as they are.
        """
        if isinstance(encoded, Decoded):
            return encoded
        device = next(iter(self.calibration.values())).mean.device
        with torch.autocast(device.type, enabled=False):
            blocks = {b: self.codec.decode(parts, self.calibration[b]) for b, parts in encoded.blocks.items()}
        return Decoded(blocks, encoded.positions)


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
        most = f"{_name(dtype)} ({torch.finfo(dtype).max:.5g})"
        advice = "; use cache.codec bfloat16" if dtype == torch.float16 else ""
        raise UserError(f"features reach {float(x.abs().max()):.0f}, beyond {most}{advice}")
    return values


def _uniform(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes (n, N, d) and float32 scales (n, N), which are float16 numbers if they are in its range.

    Overwrites `standard`.
    """
    # The scale is rounded up to a float16 above zero, so that the largest value of a token stays within 127 steps.
    scale = (standard.abs().amax(-1) / 127 * (1 + 2**-10)).clamp_min(2**-14).to(torch.float16).float()
    return standard.div_(scale.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), scale


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
