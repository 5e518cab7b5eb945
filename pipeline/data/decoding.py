"""Decode images. Archives may be hostile: images are decoded with care, nothing is unpickled."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from singer.errors import UserError

# Larger images are refused before they are decoded: a few bytes can claim gigabytes.
MAX_PIXELS = 100_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")


def open_image(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """Open an image of a known kind and sane size, without decoding it.

    Raises UserError if it is too large, OSError or SyntaxError if it is no such image.
    """
    try:
        return open_known(data, formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: {error}") from None


def decode(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """Decode an image in the mode in which it is stored. Raises UserError that begins with `where` if that fails."""
    with named_errors(where):
        image = open_known(data, formats)
        image.load()
        return image


def open_known(data: bytes, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """Open an image as open_image does, but raise PIL's own error if it is too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # PIL's own message names an address in memory, which differs in every run.
        raise UnidentifiedImageError(f"cannot identify image file as {', '.join(formats)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    return image


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a UserError that begins with `where`."""
    try:
        yield
    except Exception as error:  # decoders raise many kinds of errors on broken data
        raise UserError(f"{where} cannot be decoded: {one_line(error)}") from None


@contextmanager
def decoding_quietly() -> Iterator[None]:
    """Refuse images of a suspicious size, and ignore PIL's other warnings, in all threads until the block ends.

    The filters of warnings belong to the process, so this is called once and not in each thread.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. 16-bit greys are scaled to 8 bits; transparent images get a white background."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def one_line(error: Exception) -> str:
    """Return an error's message on one line, or its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
