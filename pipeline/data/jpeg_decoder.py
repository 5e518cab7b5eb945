"""Decode JPEGs and cut views on a device, by torchvision and torch, in the place of Pillow (views.decoder).

The filter is Pillow's, but Pillow rounds after each of the two sides, and this only in the end; docs/choosing.md says
how far views differ. What is not a plain JPEG is left to Pillow.
"""

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.config import MAX_PIXELS
from pipeline.data.decoder_warnings import warnings_of
from pipeline.data.decoding import decode_rgb, named_errors, open_image, orientation
from pipeline.data.image_reading import ImageFile
from pipeline.data.views import View, apply_view, recolored
from pipeline.runtime.error_kinds import one_line
from singer.errors import UserError
from singer.sizes import ImageSize, Size

Picture = Image.Image | Tensor
"""An RGB image that is turned as its EXIF says: Pillow's, or (3, height, width) uint8 on a device."""

Encoded = tuple[bytes, str]
"""The bytes of an image, and its name for messages."""

CPU = torch.device("cpu")
# Of the images that are decoded in one call; each pixel takes three bytes of the device's memory.
_PIXELS_TOGETHER = 50_000_000
# By EXIF orientation: whether rows become columns, and which axes are then reversed.
_SIDEWAYS = (5, 6, 7, 8)
_REVERSED = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}


@dataclass(frozen=True)
class _Jpeg:
    """A JPEG that torchvision may decode. data: its bytes, uint8 on the CPU; turn: its EXIF orientation."""

    data: Tensor
    turn: int
    pixels: int


class JpegDecoder:
    """Decodes JPEGs on a device, several in one call; with the kind "pillow" it leaves all of them to Pillow.

    kind: as views.decoder; device: the teacher's; afterwards the one where views are made, the CPU for Pillow. It is
    safe to share between threads. Raises UserError if torchvision cannot decode JPEGs on the device.
    """

    def __init__(self, kind: Literal["pillow", "torchvision"], device: torch.device) -> None:
        self._active = kind == "torchvision"
        self.device = device if self._active else CPU
        if self._active:
            sample = io.BytesIO()
            Image.new("RGB", (16, 16)).save(sample, "JPEG")
            try:
                decode_jpeg([_bytes(sample.getvalue())], ImageReadMode.RGB, device)
            except RuntimeError as error:
                raise UserError(
                    f"torchvision cannot decode JPEGs on {device} ({one_line(error, 200)}); start a cache with "
                    "--set views.decoder=pillow"
                ) from error

    def __call__(self, images: Iterable[Encoded], max_pixels: int) -> Iterator[tuple[Encoded, Tensor | None]]:
        """Yield each image with its pixels, (3, height, width) uint8; with None if it is left to Pillow.

        max_pixels: more are left to Pillow, too, which refuses them.
        """
        if not self._active:
            yield from ((image, None) for image in images)
            return
        waiting: list[tuple[Encoded, _Jpeg | None]] = []
        pixels = 0
        for image in images:
            jpeg = _plain_jpeg(*image, max_pixels)
            more = 0 if jpeg is None else jpeg.pixels
            if pixels + more > _PIXELS_TOGETHER:
                yield from self._decoded(waiting)
                waiting, pixels = [], 0
            waiting.append((image, jpeg))
            pixels += more
        yield from self._decoded(waiting)

    def read(self, files: ImageFile, numbers: Iterable[int]) -> Iterator[Picture]:
        """Yield images by their numbers as RGB. Raises UserError that names one which cannot be decoded."""
        most = files.images.max_pixels
        for (data, where), pixels in self(map(files.encoded, numbers), most):
            if pixels is not None:
                yield pixels
                continue
            with named_errors(where):
                image = decode_rgb(data, most)
            yield image

    def _decoded(self, images: list[tuple[Encoded, _Jpeg | None]]) -> Iterator[tuple[Encoded, Tensor | None]]:
        found = iter(self._pixels([jpeg.data for _, jpeg in images if jpeg is not None]))
        for image, jpeg in images:
            pixels = None if jpeg is None else next(found)
            yield image, pixels if jpeg is None or pixels is None else _turned(pixels, jpeg.turn)

    def _pixels(self, jpegs: list[Tensor]) -> list[Tensor | None]:
        """Decode JPEGs in one call or, if one of them is broken, each by itself; a broken one is None."""
        if not jpegs:
            return []
        try:
            return list(decode_jpeg(jpegs, ImageReadMode.RGB, self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return [None] if len(jpegs) == 1 else [pixels for one in jpegs for pixels in self._pixels([one])]


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _plain_jpeg(data: bytes, where: str, max_pixels: int) -> _Jpeg | None:
    """Return a whole JPEG, grey or of the usual colours; None for what Pillow decodes, or refuses."""
    if not (data.startswith(b"\xff\xd8") and data.rstrip(b"\0").endswith(b"\xff\xd9")):
        return None
    try:
        with warnings_of(where):
            image = open_image(data, ("JPEG",), min(max_pixels, MAX_PIXELS))
            turn = orientation(image)
    except Exception:  # Pillow meets it again, and says what is wrong
        return None
    usual = image.format == "JPEG" and image.mode in ("RGB", "L") and image.info.get("adobe_transform") != 0
    return _Jpeg(_bytes(data), turn, image.width * image.height) if usual else None


def _turned(pixels: Tensor, turn: int) -> Tensor:
    if turn in _SIDEWAYS:
        pixels = pixels.transpose(1, 2)
    return pixels.flip(_REVERSED[turn]) if turn in _REVERSED else pixels


def size_of(picture: Picture) -> tuple[int, int]:
    """Return (width, height)."""
    return (picture.shape[2], picture.shape[1]) if isinstance(picture, Tensor) else picture.size


def cut_view(picture: Picture, view: View, size: ImageSize) -> Tensor:
    """Apply a view as apply_view does, on the picture's device: (height, width, 3) uint8."""
    if not isinstance(picture, Tensor):
        return torch.from_numpy(np.array(apply_view(picture, view, size)))
    wanted, (width, height) = Size.of(size), size_of(picture)
    left, upper, right, lower = view.within(width, height)
    columns, across = _weights(width, left, right, wanted.width, picture.device)
    rows, down = _weights(height, upper, lower, wanted.height, picture.device)
    resized = down @ (picture[:, rows, columns].float() @ across.T)
    pixels = resized.add_(0.5).clamp_(0, 255).to(torch.uint8)
    if view.flip:
        pixels = pixels.flip(2)
    return recolored(pixels, view).permute(1, 2, 0)


def _weights(side: int, low: float, high: float, count: int, device: torch.device) -> tuple[slice, Tensor]:
    """Return the pixels of a side that are needed to resize its part from low to high to `count` pixels.

    With them come their weights (count, pixels): the cubic of Keys (1981) with a = -1/2, as wide as a new pixel where
    the part is made smaller.
    """
    step = (high - low) / count
    width = max(1.0, step)
    needed = slice(max(0, math.floor(low - 2 * width)), min(side, math.ceil(high + 2 * width)))
    centres = low + step * (torch.arange(count, dtype=torch.float64, device=device) + 0.5)
    pixels = torch.arange(needed.start, needed.stop, dtype=torch.float64, device=device) + 0.5
    x = ((pixels - centres[:, None]) / width).abs().float()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return needed, weights / weights.sum(1, keepdim=True)


PILLOW = JpegDecoder("pillow", CPU)
