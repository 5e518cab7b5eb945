"""Read images by their place in a tar, a folder or a table."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.decoder_warnings import watched_decoders
from pipeline.data.decoding import decode_rgb, named_errors, read_size
from pipeline.data.images import Images
from pipeline.data.sources import kind_of
from pipeline.data.walk import printable
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter, say
from singer.errors import UserError

# This many first bytes hold the size of nearly every image.
_HEADER_BYTES = 1 << 16
# So many files say which folder holds those of a source.
_LOOKED_AT = 10_000


class ImageFile:
    """Reads images of `Images` by number, as their `decoding` says. It is safe to share between threads.

    Within its `with` block, warnings of decoders are said with the name of the image. what: the word for an
    image in messages.
    """

    def __init__(self, images: Images, what: str = "image") -> None:
        self.images, self.what = images, what
        self._context = ExitStack()
        self._kinds = [kind_of(path) for path in images.paths]
        self._readers = [kind.read(path) for kind, path in zip(self._kinds, images.paths, strict=True)]

    def read(self, number: int) -> Image.Image:
        """Return image `number` as RGB. Raises UserError that names key and container if it cannot be decoded."""
        data, where = self.encoded(number)
        with named_errors(where):
            return decode_rgb(data, self.images.max_pixels)

    def dimensions(self, number: int) -> tuple[int, int]:
        """Return (width, height) of image `number` as `read` gives it, from its header where that says enough."""
        try:
            data, _ = self.encoded(number, _HEADER_BYTES)
            return read_size(data, self.images.max_pixels, whole=False)
        except Exception:  # the header is longer, or this is not an image
            data, where = self.encoded(number)
            with named_errors(where):
                return read_size(data, self.images.max_pixels)

    def encoded(self, number: int, most: int | None = None) -> tuple[bytes, str]:
        """Return the bytes of image `number` (the first `most`), and its key and container for messages.

        Raises UserError if they cannot be read.
        """
        images, container = self.images, int(self.images.container[number])
        size, offset = int(images.size[number]), int(images.offset[number])
        file = "" if images.files is None else images.files[number]
        file_path = images.paths[container] / file if self._kinds[container].named else images.paths[container]
        where = f"{self.what} {images.keys[number]!r} in {printable(file_path)}"
        data = self._readers[container].read(file, offset, size, size if most is None else most, where)
        return data, where

    def close(self) -> None:
        """Close the files; later reads open them again."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> "ImageFile":
        self._context.enter_context(watched_decoders())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._context.close()


def readable(images: Images, *, quiet: bool = False) -> Images:
    """Return the images without those that cannot be decoded. Raises UserError if none is left.

    This decodes every image once. What is left out is said, also what could not even be listed; quiet: say nothing.
    """
    tell = (lambda text: None) if quiet else say
    for defect in images.skipped:
        tell(f"skipped: {defect}")

    def fault(number: int) -> str | None:
        try:
            files.read(number)
        except UserError as error:
            return str(error)
        return None

    sound = np.ones(len(images), dtype=np.bool_)
    workers = len(os.sched_getaffinity(0))
    with ImageFile(images) as files, meter("look for unreadable images", len(images), "images", quiet=quiet) as m:
        for number, text in enumerate(prefetch(fault, range(len(images)), workers, m)):
            if text is not None:
                tell(f"skipped: {text}")
                sound[number] = False
            m.advance(1)
    if not sound.any():
        raise UserError(f"none of the {len(images)} images of {printable(images.paths[0])} can be read")
    return images.select(np.flatnonzero(sound))


def files_of(images: Images) -> Iterator[Path]:
    """Yield the files that hold the images: shards and tables, and of folders the image files."""
    named = [kind_of(path).named for path in images.paths]
    yield from (path for path, one_each in zip(images.paths, named, strict=True) if not one_each)
    if images.files is not None:
        yield from (images.paths[s] / images.files[n] for n, s in enumerate(images.container.tolist()) if named[s])


def places_of(images: Images) -> list[Path]:
    """Return the shards and tables that hold the images, and of folders and lists the folders of the image files.

    A list's own folder may hold anything else. Of very many files, a sample decides. Folders in others are left out.
    """
    places = [path for path in images.paths if not kind_of(path).named or images.files is None]
    folders = set()
    for number, path in enumerate(images.paths):
        if kind_of(path).named and images.files is not None:
            rows = np.flatnonzero(images.container == number)
            names = (path / images.files[n] for n in rows[:: 1 + len(rows) // _LOOKED_AT].tolist())
            folders |= {Path(os.path.normpath(name)).parent for name in names}
    return [*places, *sorted(folder for folder in folders if folders.isdisjoint(folder.parents))]
