"""Images by their place in a shard. Archives may be hostile: images are decoded with care, nothing is unpickled."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.images import Images
from pipeline.storage import Opened, OpenFile
from singer.errors import UserError

# Larger images are refused before they are decoded: a few bytes can claim gigabytes.
MAX_PIXELS = 100_000_000
# This many first bytes hold the size of nearly every image.
_HEADER_BYTES = 1 << 16
_FORMATS = ("JPEG", "PNG", "WEBP")


class ImageFile:
    """Reads images of `Images` by number. It is safe to share between threads.

    what: the word for an image in messages.
    """

    def __init__(self, images: Images, what: str = "image") -> None:
        self.images, self.what = images, what
        self._files = self._closed()
        # The stamp of every shard when it was first opened.
        self._stamps: dict[int, tuple[int, int]] = {}

    def read(self, number: int) -> Image.Image:
        """Return image `number` as RGB. Raises UserError that names key and shard if it cannot be decoded."""
        data, where = self.encoded(number)
        with _decoding(where):
            return to_rgb(open_known(data))

    def dimensions(self, number: int) -> tuple[int, int]:
        """Return (width, height) of image `number`, from its header."""
        try:
            return open_known(self.encoded(number, _HEADER_BYTES)[0]).size
        except Exception:  # the header is longer, or this is no image
            data, where = self.encoded(number)
            with _decoding(where):
                return open_known(data).size

    def encoded(self, number: int, most: int | None = None) -> tuple[bytes, str]:
        """Return the bytes of image `number` (the first `most`), and its key and shard for messages.

        Raises UserError if they cannot be read.
        """
        shard = int(self.images.shard[number])
        where = f"{self.what} {self.images.keys[number]!r} in {self.images.paths[shard]}"
        size, offset = int(self.images.size[number]), int(self.images.offset[number])
        size = size if most is None else min(size, most)
        file = self._files[shard]
        try:
            with Opened((file,)) as (descriptor,):
                data, stamp = os.pread(descriptor, size, offset), file.stamp
        except OSError as error:
            raise UserError(f"shard {file.path}: {error.strerror}") from None
        # The file may have been closed and opened again, and another file holds something else at these places.
        if self._stamps.setdefault(shard, stamp) != stamp:
            raise UserError(f"{where}: the shard has changed since this run began; start it again")
        if len(data) < size:
            raise UserError(f"{where}: the shard ends {size - len(data)} bytes too early")
        return data, where

    def close(self) -> None:
        """Close the files; later reads open them again."""
        self._files = self._closed()

    def _closed(self) -> list[OpenFile]:
        return [OpenFile(path) for path in self.images.paths]

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    with _decoding(where):
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
def _decoding(where: str) -> Iterator[None]:
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
