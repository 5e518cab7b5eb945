"""The images and the teacher on which a plan measures."""

import tarfile
from collections.abc import Generator, Iterable, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.extract import Extractor, check_finite
from pipeline.cache.pixels import encode_jpegs
from pipeline.config import Config
from pipeline.data import ImageFile, Images, readable
from pipeline.data.jpeg_decoder import CPU, JpegDecoder, cut_view, size_of
from pipeline.data.source_listing import NO_LABEL
from pipeline.data.views import draw_view
from pipeline.models.backbone import Backbone
from pipeline.runtime.prefetch import prefetch
from pipeline.storage.atomic import naming
from singer.sizes import ImageSize

# At most so many images are drawn. Features are kept of at most so many records and bytes.
_IMAGES = 1024
_RECORDS = 32
_FEATURE_BYTES = 2**30


def open_teacher(config: Config, backbone: Backbone, device: torch.device) -> Extractor:
    """Return the teacher that a plan measures. It is not compiled: compiling takes longer than a measurement."""
    return Extractor(config.changed(cache={"compile": False}), backbone, device)


Record = tuple[int, int]
"""The number of an image, and the number of its view."""


class Sample:
    """Some images, by number, and their views as cache-teacher makes them. image_size, device: the teacher's."""

    def __init__(
        self,
        config: Config,
        images: Images,
        files: ImageFile,
        image_size: ImageSize,
        device: torch.device = CPU,
    ) -> None:
        self.config, self.images, self.files = config, images, files
        self.decoder = JpegDecoder(config.views.decoder, device)
        self._drawing = config.views.model_copy(update={"shape": config.views.shape or image_size})
        rng = np.random.default_rng(0)
        self._records = [divmod(int(r), config.views.count) for r in rng.permutation(len(images) * config.views.count)]

    def views(self, records: Sequence[Record], sizes: Iterable[ImageSize]) -> dict[ImageSize, Tensor]:
        """Return {size: views (n, height, width, 3) uint8} of the records, with each image decoded once."""
        found: dict[ImageSize, list[Tensor]] = {size: [] for size in sizes}
        images = self.decoder.read(self.files, [number for number, _ in records])
        for (number, view), image in zip(records, images, strict=True):
            drawn = draw_view(self._drawing, self.images.keys[number], view, size_of(image))
            for size, pictures in found.items():
                pictures.append(cut_view(image, drawn, size).to(self.decoder.device))
        return {size: torch.stack(pictures) for size, pictures in found.items()}

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def batches(self, size: int) -> list[list[Record]]:
        """Return all records in a random order, in batches of `size`; the last batch repeats the first records."""
        endless = cycle(self._records)
        return [[next(endless) for _ in range(size)] for _ in range(-(-len(self._records) // size))]

    def load(self, records: Sequence[Record], size: ImageSize) -> Tensor:
        """Return the views for the teacher, (n, height, width, 3) uint8.

        It does the work of one thread of cache-teacher: if views are stored, it encodes them, too.
        """
        settings = self.config.views
        small = (settings.pixel_size or size) if settings.pixels != "none" else size
        views = self.views(records, {size, small})
        if settings.pixels == "jpeg":
            encode_jpegs(views[small].cpu().numpy(), settings.jpeg_quality)
        return views[size]

    def decoding(self, count: int, size: ImageSize) -> Generator[int, None, None]:
        """Decode batches of `count` views in as many threads as cache-teacher does; yield the number of views."""
        batches = cycle(self.batches(count))
        for views in prefetch(lambda records: self.load(records, size), batches, self.config.cache.workers):
            yield len(views)

    def write_tar(self, path: Path, numbers: Sequence[int], prefix: str = "") -> None:
        """Write a shard of these images; a key has the prefix and, where an image is repeated, its position."""
        seen: set[int] = set()
        with naming(path), tarfile.open(path, "w") as tar:
            for place, number in enumerate(numbers):
                again = f"{place}-" if number in seen else ""
                seen.add(number)
                key = f"{prefix}{again}{self.images.keys[number]}"
                _add(tar, f"{key}.jpg", self.files.encoded(number)[0])
                label = int(self.images.labels[number])
                if label != NO_LABEL:
                    _add(tar, f"{key}.cls", str(label).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, BytesIO(data))


def draw_images(config: Config, listed: Images) -> Images:
    """Return some of the images, from all over the shards.

    Broken images are left out if data.on_error is skip. Raises UserError if none can be decoded.
    """
    chosen = np.sort(np.random.default_rng(0).choice(len(listed), min(len(listed), _IMAGES), replace=False))
    images = listed.select(chosen)
    if config.data.on_error == "fail":
        return images
    return readable(images, quiet=True)


def sample_features(config: Config, sample: Sample, teacher: Extractor, most: int = _RECORDS) -> dict[int, Tensor]:
    """Return {block: features (n, N, d)} of at most `most` records, on the teacher's device.

    Raises UserError if they are not finite.
    """
    backbone, blocks, size = teacher.backbone, teacher.blocks, config.cache.views_at_once
    tokens = backbone.prefix + backbone.grid[0] * backbone.grid[1]
    record_bytes = 4 * len(blocks) * tokens * backbone.width
    count = min(len(sample), most, _RECORDS, max(1, _FEATURE_BYTES // record_bytes))
    (records, *_) = sample.batches(count)
    outputs = []
    for start in range(0, count, size):
        views = sample.load(records[start : start + size], backbone.image_size)
        outputs.append(teacher.trial(views))
    features = {b: torch.cat([o[b] for o in outputs]) for b in blocks}
    check_finite(features, np.arange(count), lambda place: sample.images.keys[records[place][0]])
    return features
