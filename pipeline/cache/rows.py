"""Read the records of a segment for the teacher: each image is read and decoded once, and what was found is kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from pipeline.data import ImageFile, Images, OnError, image_digest, listing_hash, one_line
from pipeline.data.decoder_warnings import warnings_of
from pipeline.data.views import View, apply_view, draw_copies, draw_positions, draw_view
from singer.copies import Copying
from singer.errors import UserError
from singer.sizes import ImageSize, Size


@dataclass(frozen=True)
class Rows:
    """The records of a segment, when nothing is known about its images yet except where they are.

    Record = image · views + view. images: the listed images; first_view: the number of the first view of each image;
    views: the number of views of each image; drawing: how views are drawn; digests: (images,) uint64, the digests of
    images that were read before and must not have changed since, 0 for the others; replay: the index of an earlier
    segment with the same records, from which the views are taken; copying: how the teacher's views are copied, if they
    are.
    """

    images: Images
    first_view: int
    views: int
    drawing: ViewsConfig
    digests: np.ndarray | None = None
    replay: Index | None = None
    copying: Copying | None = None

    @classmethod
    def of(cls, manifest: Manifest, images: Images, earlier: Iterable[Segment] = ()) -> "Rows":
        """Return the records of a segment with this manifest and these listed images.

        If one of the earlier segments has the same images, their digests are taken from it, and also the views if it
        has the same.
        """
        first, count, drawing = manifest.views["first"], manifest.views_each, drawn_as(manifest.views)
        copying = manifest.teacher.copying
        for segment in earlier:
            if segment.lacks() is None:
                index = segment.index()
                if listing_hash(index.images) == manifest.data.hash:
                    replay = index if segment.manifest.views == manifest.views else None
                    return cls(images, first, count, drawing, index.digest, replay, copying)
        return cls(images, first, count, drawing, copying=copying)

    def __len__(self) -> int:
        return len(self.images) * self.views

    def key(self, record: int) -> str:
        """Return the key of the record's image."""
        return self.images.keys[record // self.views]

    def number(self, record: int) -> int:
        """Return the number of the record's view."""
        return self.first_view + record % self.views

    def view(self, record: int, size: tuple[int, int]) -> View:
        """Return the view of a record with an image of size (width, height), in pixels."""
        if self.replay is not None:
            return self.replay.record_view(record)
        return draw_view(self.drawing, self.key(record), self.number(record), size)

    def copies(self, records: np.ndarray) -> Tensor | None:
        """Return the copies of the views of some records, (n, count, 3); None if the teacher sees no copies."""
        return copies_of(self.drawing.seed, ((self.key(r), self.number(r)) for r in records.tolist()), self.copying)


def copies_of(seed: int, views: Iterable[tuple[str, int]], copying: Copying | None) -> Tensor | None:
    """Return the copies of some views, (n, count, 3) int16; None if there are none.

    seed: views.seed; views: (key of the image, number of the view).
    """
    if copying is None:
        return None
    return torch.from_numpy(np.stack([draw_copies(seed, key, number, copying) for key, number in views]))


def drawn_as(views: dict[str, Any]) -> ViewsConfig:
    """Return the settings from which a manifest's `views` came."""
    return ViewsConfig.model_validate({k: v for k, v in views.items() if k not in ("first", "count")})


@dataclass(frozen=True)
class ViewBatch:
    """The views of some records, as they were read.

    pixels: (n, height, width, 3) uint8 for the teacher, black where an image cannot be decoded; found: (n,) of dtype
    Manifest.view_form; unreadable: {image: why it cannot be decoded}; copies: see Rows.copies; beside: what is stored
    beside the features.
    """

    records: np.ndarray
    pixels: Tensor
    found: np.ndarray
    unreadable: dict[int, str]
    copies: Tensor | None
    beside: Stored


class RowReader:
    """Read records. An image is read, hashed and decoded once for all of its requested views and sizes.

    beside: whether batches have what is stored beside the features.
    """

    def __init__(
        self, rows: Rows, files: ImageFile, manifest: Manifest, on_error: OnError, *, beside: bool = True
    ) -> None:
        self.rows, self._files, self._manifest = rows, files, manifest
        self._on_error, self._beside = on_error, beside

    def __call__(self, records: np.ndarray) -> ViewBatch:
        """Read some records.

        Raises UserError for an image that has changed and, unless on_error is "skip", for an image that is broken.
        """
        wanted, stored = self._manifest.teacher.image_size, self._manifest.pixels
        sizes = {wanted, stored.size} if self._beside and stored is not None else {wanted}
        views = {size: np.zeros((len(records), *Size.of(size), 3), np.uint8) for size in sizes}
        found = np.zeros(len(records), self._manifest.view_form)
        unreadable: dict[int, str] = {}
        last, picture = -1, None
        for place, record in enumerate(records.tolist()):
            number = record // self.rows.views
            if number != last:
                last, (picture, digest) = number, self._open(number, unreadable)
            found[place]["digest"] = digest
            if picture is None:
                continue
            view = self.rows.view(record, picture.size)
            found[place]["width"], found[place]["height"] = picture.size
            found[place]["box"], found[place]["flip"] = view.box, view.flip
            if view.color is not None:
                found[place]["color"] = view.color
            for size, pixels in views.items():
                pixels[place] = apply_view(picture, view, size)
        beside = self._stored(records, found, views) if self._beside else {}
        copies = self.rows.copies(records)
        return ViewBatch(records, torch.from_numpy(views[wanted]), found, unreadable, copies, beside)

    def _stored(self, records: np.ndarray, found: np.ndarray, views: Mapping[ImageSize, np.ndarray]) -> Stored:
        """Return what is stored of some records beside their features."""
        manifest, pixels = self._manifest, self._manifest.pixels
        stored: Stored = {VIEWS: torch.from_numpy(found.view(np.uint8).reshape(len(records), -1))}
        if pixels is not None:
            small = views[pixels.size]
            stored[PIXELS] = encode_jpegs(small, pixels.quality) if pixels.quality else torch.from_numpy(small)
        if manifest.sampled:
            seed, patches, count = manifest.views["seed"], manifest.teacher.patches, manifest.stored_patches
            numbers = ((self.rows.key(r), self.rows.number(r)) for r in records.tolist())
            drawn = [draw_positions(seed, key, number, patches, count) for key, number in numbers]
            stored[POSITIONS] = torch.from_numpy(np.stack(drawn))
        return stored

    def _open(self, number: int, unreadable: dict[int, str]) -> tuple[Image.Image | None, int]:
        """Return image `number` as RGB, or None if it is broken, and its digest."""
        data, where = self._files.encoded(number)
        digest = image_digest(data)
        if self.rows.digests is not None and self.rows.digests[number] not in (0, digest):
            raise UserError(f"image {self.rows.images.keys[number]!r} has changed since it was cached ({where})")
        try:
            with warnings_of(where):
                return self._files.decode(data), digest
        except Exception as error:  # decoders raise many types of errors for broken data
            if self._on_error == "fail":
                raise UserError(
                    f"{where} cannot be decoded: {one_line(error)}; repair it, or go on without it: "
                    "--resume --on-error skip (--append --on-error skip, if it was being appended)"
                ) from None
            unreadable[number] = one_line(error)
            return None, digest
