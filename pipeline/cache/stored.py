"""What a cache stores of its records: parts with one size for every record, and byte strings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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
        """Copy the data and the lengths to a device, as Tensor.to does."""
        return Ragged(self.data.to(device), self.lengths.to(device))

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

    def varying(self) -> list[Tensor]:
        """Return the tensors (bytes,) whose length differs between batches of as many records."""
        return [part.data for parts in self.blocks.values() for part in parts.values() if isinstance(part, Ragged)]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        """Return the same records with every tensor changed, such as moved to a device."""

        def changed(part: Tensor | Ragged) -> Tensor | Ragged:
            return Ragged(change(part.data), change(part.lengths)) if isinstance(part, Ragged) else change(part)

        blocks = {block: {name: changed(part) for name, part in parts.items()} for block, parts in self.blocks.items()}
        return Encoded(blocks, None if self.positions is None else change(self.positions))

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


@dataclass(frozen=True)
class Decoded:
    """Some records as the teacher computed them.

    blocks: {block: (n, N, d) float32}; positions: (n, k), as in Encoded.
    """

    blocks: dict[int, Tensor]
    positions: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Decoded":
        """Return the same records with every tensor changed, or some records of each."""
        positions = None if self.positions is None else change(self.positions)
        return Decoded({block: change(x) for block, x in self.blocks.items()}, positions)
