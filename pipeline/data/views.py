"""Views: the part of an image that teacher and students see, mirrored or recoloured. They are replayed exactly."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional

from pipeline.config import ViewsConfig
from singer.copies import Copying
from singer.sizes import ImageSize, Size

Box = tuple[float, float, float, float]
Pixels = TypeVar("Pixels", Image.Image, torch.Tensor)
_TRIES = 10


@dataclass(frozen=True)
class View:
    """A crop box as shares of width and height (left, upper, right, lower), and whether it is mirrored.

    color: factors of brightness, contrast and saturation (1: unchanged) and shift of hue in turns (-0.5 to 0.5, 0:
    unchanged), applied in this order; None where the configuration changes no colours.
    """

    box: Box
    flip: bool = False
    color: tuple[float, float, float, float] | None = None

    def within(self, width: int, height: int) -> Box:
        """Return the box in pixels, and fractions of them, of an image of this size."""
        left, upper, right, lower = self.box
        # Rounding of the stored shares must not leave the image.
        return max(0.0, left * width), max(0.0, upper * height), min(width, right * width), min(height, lower * height)


def draw_view(config: ViewsConfig, key: str, number: int, size: tuple[int, int]) -> View:
    """Draw view `number` of the image `key` of size (width, height): a pure function of its arguments.

    It draws 27 uniform numbers with any configuration, so that no option changes what another one does: area and ratio
    of ten tries, x, y, flip, brightness, contrast, saturation, hue. If nothing depends on them, it draws none. Boxes
    and colours are float32 numbers, as the index stores them.
    """
    if config.kind == "center" and not config.flip and not any(config.color):
        return View(_float32(*crop_view(config.crop, size, config.shape).box))
    uniform = generator(config.seed, key, number, 0).random(2 * _TRIES + 7).tolist()
    tries, (x, y, flip), shifts = uniform[:-7], uniform[-7:-4], uniform[-4:]
    if config.kind == "center":
        box = crop_view(config.crop, size, config.shape).box
    else:
        box = _random_box(config, size, list(zip(tries[::2], tries[1::2], strict=True)), x, y)
    color = None
    if any(config.color):
        *factors, hue = (most * (2 * shift - 1) for most, shift in zip(config.color, shifts, strict=True))
        brightness, contrast, saturation = (max(0.0, 1 + f) for f in factors)
        color = _float32(brightness, contrast, saturation, hue)
    return View(_float32(*box), flip < config.flip, color)


def crop_view(crop: float, size: tuple[int, int], shape: ImageSize | None = None) -> View:
    """Return the centred crop with `crop` times the sides of the largest one of a shape, by default a square.

    size: (width, height) of the image; shape: height and width, of which only the ratio counts. The crop is in whole
    pixels: half a pixel to the side would blur an image that needs no resizing.
    """
    width, height = size
    high, wide = Size.of(shape or 1)
    # One side is that of the image, and only the other one is rounded.
    full = (width, width * high / wide) if width * high <= height * wide else (height * wide / high, height)
    w, h = (max(1, round(crop * side)) for side in full)
    left, upper = (width - w) // 2, (height - h) // 2
    return View((left / width, upper / height, (left + w) / width, (upper + h) / height))


def _random_box(
    config: ViewsConfig, size: tuple[int, int], tries: list[tuple[float, float]], x: float, y: float
) -> Box:
    """Choose a box as torchvision's RandomResizedCrop, but not rounded to pixels.

    tries: pairs of uniform numbers, for area and ratio; x, y: uniform numbers.
    """
    width, height = size
    shape = Size.of(config.shape or 1)
    (small, large), (narrow, wide) = config.scale, (ratio * shape.width / shape.height for ratio in config.ratio)
    for a, r in tries:
        area = width * height * (small + (large - small) * a)
        ratio = narrow * (wide / narrow) ** r
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if 1 <= w <= width and 1 <= h <= height:
            break
    else:  # take the largest centred box of an allowed ratio
        x = y = 0.5
        w = min(width, max(1.0, height * wide))
        h = min(height, max(1.0, width / narrow))
    left, upper = x * (width - w), y * (height - h)
    return left / width, upper / height, min(1.0, (left + w) / width), min(1.0, (upper + h) / height)


def _float32(*values: float) -> tuple[float, float, float, float]:
    a, b, c, d = np.array(values, np.float32).tolist()
    return a, b, c, d


def apply_view(image: Image.Image, view: View, size: ImageSize) -> np.ndarray:
    """Apply a view to an RGB image: (height, width, 3) uint8. Crop and bicubic antialiased resize are one step."""
    box = view.within(image.width, image.height)
    pixels = image.resize(Size.of(size)[::-1], Image.Resampling.BICUBIC, box=box)
    if view.flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(recolored(pixels, view))


def recolored(pixels: Pixels, view: View) -> Pixels:
    """Change the colours of a view, (3, height, width) uint8 or an image of Pillow, as it says."""
    if view.color is not None:
        brightness, contrast, saturation, hue = view.color
        if brightness != 1:
            pixels = functional.adjust_brightness(pixels, brightness)
        if contrast != 1:
            pixels = functional.adjust_contrast(pixels, contrast)
        if saturation != 1:
            pixels = functional.adjust_saturation(pixels, saturation)
        if hue != 0:
            pixels = functional.adjust_hue(pixels, hue)
    return pixels


def draw_positions(seed: int, key: str, number: int, patches: int, count: int) -> np.ndarray:
    """Draw which patches of a view are stored, (count,) int16, ascending: a pure function of its arguments."""
    order = np.argsort(generator(seed, key, number, 1).random(patches), kind="stable")
    return np.sort(order[:count]).astype(np.int16)


def draw_copies(seed: int, key: str, number: int, copying: Copying) -> np.ndarray:
    """Draw the copies of a view over which features are averaged, (count, 3) int16: a pure function of its arguments.

    See Copying.choose.
    """
    return copying.choose(generator(seed, key, number, 2).random(copying.numbers))


def generator(seed: int, key: str, number: int, purpose: int) -> np.random.Generator:
    """Return random numbers that depend on these four alone: those of view `number` of the image `key`.

    purpose: 0 to 2 here, 3 and 4 in training.augmentation, so that no purpose changes what another one draws.
    """
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u4")
    entropy = np.concatenate([np.array([seed, number, purpose], dtype=np.uint32), words])
    # NumPy guarantees the numbers of a named bit generator, but not those of its default one.
    return np.random.Generator(np.random.PCG64(entropy))


def normalise(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise pixels (B, H, W, 3), 0 to 255, to images (B, 3, H, W) float32 on the same device."""
    return standardise(pixels, channel_moments(mean, std, pixels.device))


def standardise(pixels: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Do what normalise does, with the moments of the channels on the device already."""
    # The channels are separated first, while a pixel is one byte: on a CPU that takes a fifth of the time.
    return (pixels.permute(0, 3, 1, 2).contiguous() / 255).sub_(moments[0]).div_(moments[1])


@lru_cache
def channel_moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return mean and std on the device, (2, 1, 3, 1, 1); they stay there, because each copy would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor([mean, std]).view(2, 1, 3, 1, 1).to(device)
