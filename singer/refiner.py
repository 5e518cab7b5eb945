"""Refiners: {block: features (B, N, d)} -> {block: targets (B, N, d)}, by a cleaner of artifacts, then a normaliser.

All state is buffers and parameters, so that a state dict, two names and the shapes describe a refiner.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from singer.cleaners import CLEANERS, BlockSpec, Cleaner
from singer.normalisers import NORMALISERS, Normaliser


class Refiner(nn.Module):
    """A cleaner and a normaliser for every block of `specs`."""

    def __init__(self, specs: Mapping[int, BlockSpec], cleaner: str, normaliser: str) -> None:
        super().__init__()
        self.cleaners = nn.ModuleDict({str(b): CLEANERS[cleaner](s) for b, s in specs.items()})
        self.normalisers = nn.ModuleDict({str(b): NORMALISERS[normaliser](s) for b, s in specs.items()})

    def cleaner(self, block: int) -> Cleaner:
        """Return the cleaner of a block."""
        return cast(Cleaner, self.cleaners[str(block)])

    def normaliser(self, block: int) -> Normaliser:
        """Return the normaliser of a block."""
        return cast(Normaliser, self.normalisers[str(block)])

    def clean(self, tokens: Tensor, block: int) -> Tensor:
        """Return features (B, N, d) of one block without artifacts, still in the teacher's units."""
        cleaned: Tensor = self.cleaner(block)(tokens)
        return cleaned

    def forward(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Clean and normalise the features of all blocks."""
        return {b: self.normaliser(b)(self.clean(x, b)) for b, x in features.items()}
