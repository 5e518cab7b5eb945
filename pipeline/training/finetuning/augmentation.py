"""Change views of labelled images further: RandAugment and random erasing, as the recipe of DeiT has them.

What is done to a view is a pure function of the seed, the key of the image and the epoch. timm draws it from Python's
and NumPy's own generators, which all threads share, so it is drawn here; the operations are timm's.
"""

import math

import numpy as np
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_choices

from pipeline.config import FinetuneConfig
from pipeline.data.views import generator

# What timm's rand-m9-mstd0.5-inc1 says besides the magnitude: each operation is left out with this probability, and
# its magnitude, of at most 10, varies by this standard deviation.
_LEFT_OUT, _SPREAD, _MOST = 0.5, 0.5, 10.0
OPERATIONS: tuple[str, ...] = tuple(rand_augment_choices("", increasing=True))
# {operation whose argument has a random sign: its argument at the magnitude 0, and how far it is from that at 10}
_SIGNED = {
    "Rotate": (0.0, 30.0),
    **dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), (0.0, 0.45)),
    **dict.fromkeys([f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")], (1.0, 0.9)),
}
# What comes into an image from outside it is grey.
_DRAWN_WITH = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
# Of random erasing (arXiv:1708.04896): least and largest share of the area, ratio of the sides, and tries.
_AREA, _RATIO, _TRIES = (0.02, 1 / 3), 0.3, 10


def augment(pixels: np.ndarray, settings: FinetuneConfig, key: str, epoch: int) -> np.ndarray:
    """Return a view (height, width, 3) uint8 as finetune.randaugment and finetune.erasing change it.

    key: of its image; it and the epoch say what is drawn.
    """
    if settings.randaugment is not None:
        image = rand_augment(Image.fromarray(pixels), *settings.randaugment, generator(settings.seed, key, epoch, 3))
        pixels = np.asarray(image)
    if settings.erasing:
        pixels = erase(pixels, settings.erasing, generator(settings.seed, key, epoch, 4))
    return pixels


def rand_augment(image: Image.Image, count: int, magnitude: float, numbers: np.random.Generator) -> Image.Image:
    """Apply `count` operations, of which some are left out, to an RGB image (arXiv:1909.13719)."""
    for name in numbers.choice(OPERATIONS, count).tolist():
        left_out, sign = numbers.random(2).tolist()
        strength = min(_MOST, max(0.0, numbers.normal(magnitude, _SPREAD)))
        if left_out >= _LEFT_OUT:
            image = NAME_TO_OP[name](image, *arguments(name, strength, 1 if sign < 0.5 else -1), **_DRAWN_WITH)
    return image


def arguments(name: str, magnitude: float, sign: int) -> tuple[float, ...]:
    """Return what an operation takes besides an image. magnitude: 0 to 10; sign: 1 or -1."""
    if name in _SIGNED:
        neutral, farthest = _SIGNED[name]
        return (neutral + sign * farthest * magnitude / _MOST,)
    argument_of = LEVEL_TO_ARG[name]
    return () if argument_of is None else argument_of(magnitude, {})


def erase(pixels: np.ndarray, probability: float, numbers: np.random.Generator) -> np.ndarray:
    """Replace a random rectangle of a view (height, width, 3) uint8 with noise; with 1 - probability, change nothing.

    Every byte of the noise is equally likely, as in the paper; the shape of the rectangle is that of timm.
    """
    if numbers.random() >= probability:
        return pixels
    height, width, channels = pixels.shape
    for _ in range(_TRIES):
        area = numbers.uniform(*_AREA) * height * width
        ratio = math.exp(numbers.uniform(math.log(_RATIO), -math.log(_RATIO)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = (int(numbers.integers(0, room, endpoint=True)) for room in (height - h, width - w))
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = numbers.integers(0, 256, (h, w, channels), np.uint8)
            break
    return pixels
