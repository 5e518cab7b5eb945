"""Views: which part of an image teacher and students see. Stored in the index, replayed exactly."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.config import ViewsConfig


@dataclass(frozen=True)
class View:
    """A crop box as shares of width and height (left, upper, right, lower), and whether it is mirrored."""

    box: tuple[float, float, float, float]
    flip: bool = False


def draw_view(config: ViewsConfig, key: str, number: int, size: tuple[int, int]) -> View:
    """View `number` of the image `key` of size (width, height): a pure function of its arguments."""
    assert config.kind == "center" and number == 0
    return crop_view(config.crop, size)


def crop_view(crop: float, size: tuple[int, int]) -> View:
    """The centred square with `crop` times the short side of an image of size (width, height)."""
    width, height = (crop * min(size) / side for side in size)
    return View(((1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2))


def apply_view(image: Image.Image, view: View, size: int) -> np.ndarray:
    """The view as (size, size, 3) uint8; crop and bicubic antialiased resize are one step."""
    left, upper, right, lower = view.box
    box = (left * image.width, upper * image.height, right * image.width, lower * image.height)
    # Rounding of the stored shares must not leave the image.
    box = (max(0.0, box[0]), max(0.0, box[1]), min(image.width, box[2]), min(image.height, box[3]))
    pixels = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if view.flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(pixels)


def normalise(
    pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised, on the device (moved there as uint8)."""
    images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    channel = torch.tensor([mean, std], device=device).view(2, 1, 3, 1, 1)
    return ((images - channel[0]) / channel[1]).contiguous()
