"""Images for the offline demo: real handwritten digits, each small and at a random place of an uninformative canvas.

The digits are those of scikit-learn's `load_digits`, which bundles 1,797 scans of 8x8 pixels with labels. The demo
reads no other images from disk. Every image is a pure function of (seed, split, digit, copy), so the demo draws the
same images on every machine.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from singer.errors import require_known

SPLITS = ("train", "test")
TEST_SIZE = 500


@cache
def _data() -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Return padded 10x10 digits, labels, and the digit indices of each split (fixed and stratified by label)."""
    pixels, labels = load_digits(return_X_y=True)
    scans = np.clip(pixels.reshape(-1, 8, 8) * (255 / 16), 0, 255).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SIZE, random_state=0, stratify=labels)
    # The blank border keeps the interpolation from cutting strokes off at the edge of the scan.
    padded = np.pad(scans, ((0, 0), (1, 1), (1, 1)))
    return padded, labels.astype(np.int64), {"train": np.sort(train), "test": np.sort(test)}


def split_indices(split: str) -> NDArray[np.int64]:
    """Return the rows of `load_digits` that are in one split.

    No digit is in both splits, so the teacher has seen no test digit. Raises UserError for an unknown split.
    """
    require_known("split", split, SPLITS)
    return _data()[2][split]


def digit_image(split: str, index: int, copy: int, size: int = 64) -> Image.Image:
    """Draw one digit, enlarged to 20-28 px (for size 64) and slightly turned, at a random place.

    The background is a faint tinted gradient with weak noise: most patches say nothing about the label.
    """
    rng = np.random.default_rng((0, SPLITS.index(split), index, copy))
    extent = size * rng.uniform(20, 28) / 64
    angle = np.deg2rad(rng.uniform(-12, 12))
    centre_x, centre_y = rng.uniform(extent / 2, size - extent / 2, 2)
    # Image.transform maps output pixels to input pixels, so it needs the inverse scale and rotation.
    scale = 8 / extent
    a, b = scale * np.cos(angle), scale * np.sin(angle)
    inverse = (a, b, 5 - a * centre_x - b * centre_y, -b, a, 5 + b * centre_x - a * centre_y)
    scan = Image.fromarray(_data()[0][index])
    ink_mask = scan.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    ink = np.asarray(ink_mask, np.float32)[..., None] / 255

    paper = rng.uniform(60, 80) + rng.uniform(-6, 6, 3).astype(np.float32)
    slope = rng.uniform(-6, 6, 2).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    faint = slope[0] * ramp[:, None] + slope[1] * ramp + 3 * rng.standard_normal((size, size), np.float32)
    pen = np.float32(rng.uniform(100, 160)) + rng.uniform(-10, 10, 3).astype(np.float32)
    canvas = paper.astype(np.float32) + faint[..., None] + ink * pen
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def digit_images(split: str, copies: int, size: int = 64) -> Iterator[tuple[str, Image.Image, int]]:
    """Yield (key, image, label), `copies` differently placed images of every digit of a split.

    The key is "index-copy", the index being the digit's row in `load_digits`, e.g. "0007-2".
    """
    labels = _data()[1]
    for index in split_indices(split).tolist():
        for copy in range(copies):
            yield f"{index:04d}-{copy}", digit_image(split, index, copy, size), int(labels[index])
