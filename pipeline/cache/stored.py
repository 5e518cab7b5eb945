"""What a cache stores of its records: parts with one size for every record, and byte strings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.runtime.buffers import moved


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
        return Ragged(moved(self.data, device), moved(self.lengths, device))

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
"""{name of a part or an array: its values of some records}."""


@dataclass(frozen=True)
class Encoded:
    """Some records as they are stored.

    blocks: {block: {part: its stored values}}; positions: (n, k) int16 patch numbers, if patches were sampled.
    """

    blocks: dict[int, Stored]
    positions: Tensor | None = None

    def to(self, device: torch.device) -> "Encoded":
        """Copy everything to a device, as `moved` does."""
        blocks: dict[int, Stored] = {
            block: {
                n: part.to(device) if isinstance(part, Ragged) else moved(part, device) for n, part in parts.items()
            }
            for block, parts in self.blocks.items()
        }
        return Encoded(blocks, None if self.positions is None else moved(self.positions, device))

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over all tensors."""
        for part in (part for parts in self.blocks.values() for part in parts.values()):
            yield from (part.data, part.lengths) if isinstance(part, Ragged) else (part,)
        if self.positions is not None:
            yield self.positions

    def split(self, counts: list[int]) -> list["Encoded"]:
        """Split the records into groups with `counts` records each; the groups share the memory of the whole."""
        if len(counts) == 1:
            return [self]
        pieces: list[dict[int, Stored]] = [{block: {} for block in self.blocks} for _ in counts]
        for block, parts in self.blocks.items():
            for name, part in parts.items():
                for piece, own in zip(pieces, part.split(counts), strict=True):
                    piece[block][name] = own
        positions = [None] * len(counts) if self.positions is None else self.positions.split(counts)
        return [Encoded(*piece) for piece in zip(pieces, positions, strict=True)]
