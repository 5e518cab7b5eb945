"""Round rotated tokens to Lloyd-Max levels (Lloyd 1982, Max 1960), and pack the codes of the levels into bytes.

The rotation that makes channels Gaussian is that of QuaRot (Ashkboos et al., arXiv 2404.00456).
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

# The positive half of the Lloyd-Max levels of a standard normal variable, by number of bits.
LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.797884561,),
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (0.12839503, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571),
}


def lloyd_max(y: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
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


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply every group of b channels of x (n, N, d) by the same (b, b) matrix."""
    rotated: Tensor = x.unflatten(-1, (-1, len(rotation))) @ rotation
    return rotated.flatten(-2)


def plane_bits(bits: int) -> tuple[int, ...]:
    """Return the bits of each plane in which codes are packed; a byte holds whole codes of one plane."""
    return (2, 1) if bits == 3 else (bits,)


def _plane_values(bits: int) -> tuple[tuple[float, ...], ...]:
    """Return, for each plane, the factor that each of its codes contributes to the level."""
    positive = LEVELS[bits]
    return (positive, (1.0, -1.0)) if bits == 3 else (positive + tuple(-v for v in positive),)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (..., d) into (..., bytes).

    A byte holds neighbouring channels, the first one in its lowest bits.
    """
    planes = []
    for width in plane_bits(bits):
        # View all codes that share a byte as one little-endian number, and collect them in its lowest byte.
        padded = F.pad(codes & (2**width - 1), (0, -codes.shape[-1] % (8 // width)))
        apart = padded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // width])
        together = apart.clone()
        for i in range(1, 8 // width):
            together |= apart >> i * (8 - width)
        planes.append(together.to(torch.uint8))
        codes = codes >> width
    return planes[0] if len(planes) == 1 else torch.cat(planes, -1)


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """Unpack codes (n, N, bytes) into levels (n, N, d) float32."""
    widths = [-(-d * width // 8) for width in plane_bits(bits)]
    planes = [
        _lookup(plane, _table(values, packed.device))[..., :d]
        for plane, values in zip(packed.split(widths, -1), _plane_values(bits), strict=True)
    ]
    return planes[0] if len(planes) == 1 else planes[0].mul_(planes[1])


# {(values, device): table}; see load_tables.
_TABLES: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def load_tables(device: torch.device) -> None:
    """Put the tables of all codecs on a device, where `unpack` finds them; compiled code cannot make them once."""
    for values in {values for bits in LEVELS for values in _plane_values(bits)}:
        _table(values, device)


def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the values that each byte stands for, (256, codes per byte) float32."""
    if (values, device) not in _TABLES:
        width = (len(values) - 1).bit_length()
        shifts = torch.arange(0, 8, width)
        table = torch.tensor(values)[torch.arange(256).unsqueeze(-1) >> shifts & (2**width - 1)]
        _TABLES[values, device] = table.to(device)
    return _TABLES[values, device]


def _lookup(packed: Tensor, table: Tensor) -> Tensor:
    """Look up each byte of (n, N, bytes) in a table (256, codes per byte); return (n, N, bytes x codes per byte)."""
    index = packed.int()
    if table.shape[1] == 2 and packed.device.type == "cpu":
        # On a CPU, reading a pair as one complex number is three times as fast as reading a row of two numbers.
        pairs = torch.view_as_complex(table).index_select(0, index.flatten())
        return torch.view_as_real(pairs).view(*packed.shape[:-1], 2 * packed.shape[-1])
    return F.embedding(index, table).flatten(-2)
