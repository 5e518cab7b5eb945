"""Images by their place in a shard, decoded with care: archives are taken for hostile, and nothing is unpickled."""

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

# Larger images are refused before they are decoded: a few bytes can ask for gigabytes.
MAX_PIXELS = 100_000_000
# Enough for the size of nearly every image.
_HEADER_BYTES = 1 << 16
_FORMATS = ("JPEG", "PNG", "WEBP")


class ImageFile:
    """Reads images of `Images` by number; safe to share between threads.

    what: the word for them in messages.
    """

    def __init__(self, images: Images, what: str = "image") -> None:
        self.images, self.what = images, what
        self._files = self._closed()
        # Of every shard when it was first opened.
        self._stamps: dict[int, tuple[int, int]] = {}

    def read(self, number: int) -> Image.Image:
        """Image `number`, RGB. Raises UserError naming key and shard if it cannot be decoded."""
        data, where = self.encoded(number)
        with _decoding(where):
            return to_rgb(open_known(data))

    def dimensions(self, number: int) -> tuple[int, int]:
        """(width, height) of image `number`, from its header."""
        try:
            return open_known(self.encoded(number, _HEADER_BYTES)[0]).size
        except Exception:  # a long header, or no image at all
            data, where = self.encoded(number)
            with _decoding(where):
                return open_known(data).size

    def encoded(self, number: int, most: int | None = None) -> tuple[bytes, str]:
        """The bytes of image `number` (the first `most`), and its key and shard for messages.

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
        # It may have been closed and opened again since, and in another file these places hold something else.
        if self._stamps.setdefault(shard, stamp) != stamp:
            raise UserError(f"{where}: the shard has changed since this run began; start it again")
        if len(data) < size:
            raise UserError(f"{where}: the shard ends {size - len(data)} bytes too early")
        return data, where

    def close(self) -> None:
        self._files = self._closed()

    def _closed(self) -> list[OpenFile]:
        return [OpenFile(path) for path in self.images.paths]

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """An image of a known kind and sane size, not yet decoded.

    Raises UserError if it is too large, OSError or SyntaxError if it is no such image.
    """
    try:
        return open_known(data, formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: {error}") from None


def decode(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """An image as it is stored, in whatever mode. Raises UserError beginning with `where` if it cannot be decoded."""
    with _decoding(where):
        image = open_known(data, formats)
        image.load()
        return image


def open_known(data: bytes, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """As open_image, with PIL's own error if the image is too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # PIL's own message names an address in memory: other words in every run.
        raise UnidentifiedImageError(f"cannot identify image file as {', '.join(formats)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    return image


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise whatever broken data makes them stumble over
        raise UserError(f"{where} cannot be decoded: {one_line(error)}") from None


@contextmanager
def decoding_quietly() -> Iterator[None]:
    """Have images of a suspicious size refused, and all else that PIL grumbles about ignored, in whatever thread.

    The filters belong to the process, so they are set here and not in the threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; 16-bit greys are scaled to 8 bits, transparency is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def one_line(error: Exception) -> str:
    """What it says, on one line; its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
