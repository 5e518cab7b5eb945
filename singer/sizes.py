"""Sizes of images and patches: one number for a square, or height and width."""

import math
from typing import NamedTuple, TypeAlias

from singer.errors import UserError

ImageSize: TypeAlias = int | tuple[int, int]
"""A size in pixels as it is written in settings and files: the side of a square, or (height, width)."""


class Size(NamedTuple):
    """Height and width: of an image or a patch, in pixels, or of a grid, in rows and columns."""

    height: int
    width: int

    @classmethod
    def of(cls, size: "ImageSize | list[int]") -> "Size":
        """Return a size that may be given as one number. JSON has pairs as lists."""
        return cls(size, size) if isinstance(size, int) else cls(*size)

    @property
    def written(self) -> ImageSize:
        """Return the side of a square, and (height, width) otherwise: equal sizes are written alike."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def shape(self) -> "Size":
        """Return the ratio of height to width in the smallest whole numbers."""
        common = math.gcd(*self)
        return Size(self.height // common, self.width // common)

    def within(self, longest: int) -> "Size":
        """Return a size of this shape, to whole pixels, whose longer side has `longest` pixels."""
        return Size(*(max(1, round(longest * side / max(self))) for side in self))

    def grid(self, patch: ImageSize) -> "Size":
        """Return how many patches of a size fit in rows and columns."""
        high, wide = Size.of(patch)
        return Size(self.height // high, self.width // wide)

    def __str__(self) -> str:
        """Return 224 for a square, and 224x448 otherwise, as the configuration reads it."""
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


def check_multiple(image_size: ImageSize, patch: ImageSize, subject: str = "") -> None:
    """Raise UserError, with the nearest size, if the sides of an image are not multiples of those of a patch.

    subject: what the message begins with.
    """
    size, of = Size.of(image_size), Size.of(patch)
    near = Size(*(max(1, round(side / unit)) * unit for side, unit in zip(size, of, strict=True)))
    if any(side % unit for side, unit in zip(size, of, strict=True)):
        raise UserError(f"{subject}image_size {size} is not a multiple of the patch size {of}; the nearest is {near}")
