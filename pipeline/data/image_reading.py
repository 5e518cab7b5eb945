"""Read images by their place in a shard."""

import os
from contextlib import ExitStack

from PIL import Image

from pipeline.data.decoder_warnings import watched_decoders
from pipeline.data.decoding import decode_rgb, named_errors, read_size
from pipeline.data.images import Images
from pipeline.storage import Opened, OpenFile
from singer.errors import UserError

# This many first bytes hold the size of nearly every image.
_HEADER_BYTES = 1 << 16


class ImageFile:
    """Reads images of `Images` by number, as their `decoding` says. It is safe to share between threads.

    Within its `with` block, warnings of decoders are said with the name of the image. what: the word for an
    image in messages.
    """

    def __init__(self, images: Images, what: str = "image") -> None:
        self.images, self.what = images, what
        self._files = self._closed()
        self._context = ExitStack()
        # The stamp of every shard when it was first opened.
        self._stamps: dict[int, tuple[int, int]] = {}

    def read(self, number: int) -> Image.Image:
        """Return image `number` as RGB. Raises UserError that names key and shard if it cannot be decoded."""
        data, where = self.encoded(number)
        with named_errors(where):
            return decode_rgb(data, self.images.decoding)

    def dimensions(self, number: int) -> tuple[int, int]:
        """Return (width, height) of image `number` as `read` gives it, from its header where that says enough."""
        try:
            return read_size(self.encoded(number, _HEADER_BYTES)[0], self.images.decoding, whole=False)
        except Exception:  # the header is longer, or this is no image
            data, where = self.encoded(number)
            with named_errors(where):
                return read_size(data, self.images.decoding)

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
        self._context.enter_context(watched_decoders())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._context.close()
