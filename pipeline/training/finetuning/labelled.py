"""Batches of labelled images for fine-tuning, with new views in every epoch.

Views are a pure function of the seed, the key of an image and the epoch, so that a resumed run repeats them, and
several processes see what one would.
"""

import itertools
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from pipeline.config import FinetuneConfig, ViewsConfig
from pipeline.data import ImageFile
from pipeline.data.sampler import BatchIndices
from pipeline.data.views import apply_view, crop_view, draw_view
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Meter
from pipeline.training.batch import Batch
from pipeline.training.finetuning.augmentation import augment
from singer.errors import UserError
from singer.sizes import ImageSize, Size


class LabelledLoader:
    """Loads batches of labelled images at one size, (height, width) or the side of a square, in pixels.

    numbers: (n,) of the images, which then have the numbers from 0 on; settings: how views are drawn; with None, they
    are the largest centred crops.
    """

    def __init__(self, files: ImageFile, numbers: np.ndarray, size: ImageSize, settings: FinetuneConfig | None) -> None:
        self.files, self.numbers, self.size = files, numbers, size
        self._drawn_by = None if settings is None else (settings, views_of(settings, size))
        self._labels = torch.from_numpy(files.images.labels[numbers]).long()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.numbers)

    @property
    def image_numbers(self) -> np.ndarray:
        """Return the number of each image, (n,)."""
        return self.numbers

    @property
    def record_bytes(self) -> int:
        """Return how many bytes of pixels an image has."""
        return 3 * Size.of(self.size).height * Size.of(self.size).width

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead."""
        with closing(prefetch(self.pixels, itertools.chain.from_iterable(lists), workers, meter)) as batches:
            for indices, pixels in batches:
                labels = self._labels[torch.from_numpy(indices.records)]
                filling = int((indices.weights == 0).sum())
                weights = torch.from_numpy(indices.weights)
                yield Batch({self.size: pixels}, [], weights, labels, filling, step=indices.step)

    def pixels(self, indices: BatchIndices) -> tuple[BatchIndices, Tensor]:
        """Return the batch indices, and the views of their images, (n, height, width, 3) uint8.

        Raises UserError, with the remedy, for an image that cannot be read.
        """
        views: list[np.ndarray] = []
        for number in self.numbers[indices.records].tolist():
            try:
                image = self.files.read(number)
            except UserError as error:
                advice = "repair it, or leave out all such images (--on-error skip), and start anew with --overwrite"
                raise UserError(f"{error}; {advice}") from error
            if self._drawn_by is None:
                views.append(apply_view(image, crop_view(1.0, image.size, self.size), self.size))
                continue
            (settings, views_by), key = self._drawn_by, self.files.images.keys[number]
            view = draw_view(views_by, key, indices.epoch, image.size)
            views.append(augment(apply_view(image, view, self.size), settings, key, indices.epoch))
        return indices, torch.from_numpy(np.stack(views))


def views_of(settings: FinetuneConfig, size: ImageSize) -> ViewsConfig:
    """Return what views are drawn with; the epoch is their number."""
    return ViewsConfig(
        kind="random-resized-crop", shape=size, scale=settings.scale, ratio=settings.ratio, flip=settings.flip,
        color=settings.color, seed=settings.seed,
    )  # fmt: skip
