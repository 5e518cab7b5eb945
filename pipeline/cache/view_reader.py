"""Read the views of a segment for the teacher: each image is read and decoded once, and what was found is kept."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.cache.format import PIXELS, POSITIONS, VIEWS
from pipeline.cache.index import Index
from pipeline.cache.manifest import Manifest
from pipeline.cache.pixels import encode_jpegs
from pipeline.cache.segments import Segment
from pipeline.cache.stored import Stored
from pipeline.config import ViewsConfig
from pipeline.data import ImageFile, OnError, decode_rgb, image_digest, listing_hash
from pipeline.data.decoder_warnings import warnings_of
from pipeline.data.jpeg_decoder import CPU, Encoded, JpegDecoder, Picture, cut_view, size_of
from pipeline.data.source_listing import ChangedImage
from pipeline.data.views import draw_copies, draw_positions, draw_view
from pipeline.runtime.buffers import empty
from pipeline.runtime.error_kinds import one_line
from singer.copies import Copying
from singer.errors import UserError
from singer.sizes import ImageSize, Size

# Its listed size is that of the broken file.
_ADVICE = (
    "repair it and start anew, or go on without it: "
    "--resume --on-error skip (--append --on-error skip, if it was being appended)"
)


def copies_of(seed: int, views: Iterable[tuple[str, int]], copying: Copying) -> Tensor:
    """Return the copies of some views, (n, count, 3) int16.

    seed: views.seed; views: (key of the image, number of the view).
    """
    return torch.from_numpy(np.stack([draw_copies(seed, key, number, copying) for key, number in views]))


def drawn_as(views: dict[str, Any]) -> ViewsConfig:
    """Return the settings from which a manifest's `views` came."""
    return ViewsConfig.model_validate({k: v for k, v in views.items() if k not in ("first", "count")})


@dataclass(frozen=True)
class ViewBatch:
    """The views of some records, as they were read.

    pixels: (n, height, width, 3) uint8 for the teacher, black where an image cannot be decoded, on the device where the
    decoder makes them; found: (n,) of dtype Manifest.view_form; unreadable: {image: why it cannot be decoded}; copies:
    see copies_of, None without them; beside: what is stored beside the features.
    """

    records: np.ndarray
    pixels: Tensor
    found: np.ndarray
    unreadable: dict[int, str]
    copies: Tensor | None
    beside: Stored


class ViewReader:
    """Read the views of records. An image is read, hashed and decoded once for all of its requested views and sizes.

    Record = image · views + view. files: the listed images; earlier: segments; the first one with the same images says
    which digests they must still have, and the first one that has the same views, too, which views; digests: (images,)
    uint64, the digests to be used in its place, 0 for an image that was not read before; device: the teacher's, on
    which torchvision decodes if it is the manifest's decoder; beside: whether batches have what is stored beside the
    features.
    """

    def __init__(
        self,
        files: ImageFile,
        manifest: Manifest,
        on_error: OnError,
        earlier: Iterable[Segment] = (),
        digests: np.ndarray | None = None,
        *,
        device: torch.device = CPU,
        beside: bool = True,
    ) -> None:
        self.images = files.images
        self._files, self._manifest, self._on_error, self._beside = files, manifest, on_error, beside
        self._views, self._drawing = manifest.views_each, drawn_as(manifest.views)
        self._decoder, self._digests = JpegDecoder(self._drawing.decoder, device), digests
        self._replay: Index | None = None
        for segment in earlier:
            if segment.lacks() is None:
                index = segment.index()
                if listing_hash(index.images) == manifest.data.hash:
                    if self._digests is None:
                        self._digests = index.digest
                    if segment.manifest.views == manifest.views:
                        self._replay = index
                        break

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.images) * self._views

    def key(self, record: int) -> str:
        """Return the key of the record's image."""
        return self.images.keys[record // self._views]

    def __call__(self, records: np.ndarray) -> ViewBatch:
        """Read some records.

        Raises UserError for an image that has changed and, unless on_error is "skip", for an image that is broken.
        """
        wanted, stored = self._manifest.teacher.image_size, self._manifest.pixels
        sizes = {wanted, stored.size} if self._beside and stored is not None else {wanted}
        views = {size: self._black((len(records), *Size.of(size), 3)) for size in sizes}
        found = np.zeros(len(records), self._manifest.view_form)
        unreadable: dict[int, str] = {}
        numbers = (records // self._views).tolist()
        pictures = self._pictures([number for number, _ in groupby(numbers)], unreadable)
        last, picture, digest = -1, None, 0
        for place, (record, number) in enumerate(zip(records.tolist(), numbers, strict=True)):
            if number != last:
                last, (picture, digest) = number, next(pictures)
            found[place]["digest"] = digest
            if picture is None:
                continue
            if self._replay is not None:
                view = self._replay.record_view(record)
            else:
                view = draw_view(self._drawing, *self._named(record), size_of(picture))
            found[place]["width"], found[place]["height"] = size_of(picture)
            found[place]["box"], found[place]["flip"] = view.box, view.flip
            if view.color is not None:
                found[place]["color"] = view.color
            for size, pixels in views.items():
                pixels[place] = cut_view(picture, view, size)
        beside = self._stored(records, found, views) if self._beside else {}
        copying = self._manifest.teacher.copying
        copies = None
        if copying is not None:
            copies = copies_of(self._drawing.seed, map(self._named, records.tolist()), copying)
        return ViewBatch(records, views[wanted], found, unreadable, copies, beside)

    def _black(self, shape: tuple[int, ...]) -> Tensor:
        """Return black pixels where views are made."""
        device = self._decoder.device
        if device.type == "cpu":
            return empty(shape, "uint8").zero_()
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def _named(self, record: int) -> tuple[str, int]:
        """Return the key of the record's image and the number of its view."""
        image, view = divmod(record, self._views)
        return self.images.keys[image], self._manifest.views["first"] + view

    def _stored(self, records: np.ndarray, found: np.ndarray, views: Mapping[ImageSize, Tensor]) -> Stored:
        """Return what is stored of some records beside their features."""
        manifest, pixels = self._manifest, self._manifest.pixels
        stored: Stored = {VIEWS: torch.from_numpy(found.view(np.uint8).reshape(len(records), -1))}
        if pixels is not None:
            small = views[pixels.size].cpu()
            stored[PIXELS] = encode_jpegs(small.numpy(), pixels.quality) if pixels.quality else small
        if manifest.sampled:
            seed, patches, count = self._drawing.seed, manifest.teacher.patches, manifest.stored_patches
            drawn = [draw_positions(seed, *self._named(r), patches, count) for r in records.tolist()]
            stored[POSITIONS] = torch.from_numpy(np.stack(drawn))
        return stored

    def _pictures(self, numbers: Sequence[int], unreadable: dict[int, str]) -> Iterator[tuple[Picture | None, int]]:
        """Yield images as RGB, None for those that are broken or have changed, each with its digest."""

        def encoded(number: int) -> Encoded:
            try:
                return self._files.encoded(number)
            except ChangedImage as error:
                if self._on_error == "fail":
                    raise UserError(f"{error}; {_ADVICE}") from None
                unreadable[number] = str(error)
                return b"", ""

        images = self._decoder(map(encoded, numbers), self.images.max_pixels)
        for number, ((data, where), pixels) in zip(numbers, images, strict=True):
            if not where:
                yield None, 0
                continue
            digest = image_digest(data)
            if self._digests is not None and self._digests[number] not in (0, digest):
                raise UserError(f"image {self.images.keys[number]!r} has changed since it was cached ({where})")
            yield pixels if pixels is not None else self._by_pillow(number, data, where, unreadable), digest

    def _by_pillow(self, number: int, data: bytes, where: str, unreadable: dict[int, str]) -> Image.Image | None:
        """Decode image `number` as RGB; return None if it is broken."""
        try:
            with warnings_of(where):
                return decode_rgb(data, self.images.max_pixels)
        except Exception as error:  # decoders raise many types of errors for broken data
            if self._on_error == "fail":
                raise UserError(f"{where} cannot be decoded: {one_line(error, None)}; {_ADVICE}") from None
            unreadable[number] = one_line(error, None)
            return None
