"""Batches of labelled images for fine-tuning: new views in every epoch, mixed by Mixup and CutMix.

All that is drawn is a pure function of the seed and the key of an image and the epoch, or the step, so that a resumed
run repeats it, and several processes see what one would.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from pipeline.config import FinetuneConfig, ViewsConfig
from pipeline.data import ImageFile
from pipeline.data.sampler import BatchIndices
from pipeline.data.views import apply_view, crop_view, draw_view
from pipeline.models.backbone import Backbone
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Meter
from pipeline.training.batch import Batch, StoredBatch
from singer.errors import UserError
from singer.sizes import ImageSize, Size


class Mixing:
    """Mixes images and labels of neighbours in a batch as timm does, and smooths the labels.

    The parameters are drawn once for each step. A batch is mixed in pairs of neighbours, in its order, and an odd last
    image is left as it is. So several processes mix as one does, if each has an even number of images.
    """

    def __init__(self, settings: FinetuneConfig, classes: int) -> None:
        self._seed, self._classes, self._smoothing = settings.seed, classes, settings.smoothing
        self._mixup: Mixup | None = None
        if settings.mixup or settings.cutmix:
            self._mixup = Mixup(
                settings.mixup, settings.cutmix, prob=settings.mix_prob, switch_prob=settings.cutmix_prob,
                label_smoothing=settings.smoothing, num_classes=classes,
            )  # fmt: skip

    def __call__(self, batch: Batch, step: int) -> Batch:
        """Return a batch with labels (B,) mixed: its labels are shares of classes (B, classes)."""
        images, shares = batch.images, mixup_target(batch.labels, self._classes, smoothing=self._smoothing)
        paired = (len(images) - batch.filling) // 2 * 2
        if self._mixup is not None and paired:
            # timm mixes the first image with the last one, and so on.
            numbers = torch.arange(paired, device=images.device)
            order = torch.cat([numbers[::2], numbers[1::2].flip(0)])
            with _numpy_seed(self._seed, step):
                mixed, targets = self._mixup(images[order], batch.labels[order])
            images = images.index_copy(0, order, mixed)
            shares = shares.index_copy(0, order, targets)
        return replace(batch, images=images, labels=shares)


@contextmanager
def _numpy_seed(*words: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which timm draws, and restore it."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(words)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


class LabelledLoader:
    """Loads batches of labelled images at one size, (height, width) or the side of a square, in pixels.

    numbers: (n,) of the images, which then have the numbers from 0 on; settings: how views are drawn and mixed; with
    None, views are the largest centred crops, and labels are one class each; classes: how many there are.
    """

    def __init__(
        self, files: ImageFile, numbers: np.ndarray, size: ImageSize, classes: int, settings: FinetuneConfig | None
    ) -> None:
        self.files, self.numbers, self.size, self.classes = files, numbers, size, classes
        self._views = views_of(settings, size) if settings is not None else None
        self._mixing = Mixing(settings, classes) if settings is not None else None
        self._labels = torch.from_numpy(files.images.labels[numbers]).long()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.numbers)

    @property
    def record_bytes(self) -> int:
        """Return how many bytes of pixels an image has."""
        return 3 * Size.of(self.size).height * Size.of(self.size).width

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[StoredBatch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead."""
        with closing(prefetch(self.pixels, itertools.chain.from_iterable(lists), workers, meter)) as batches:
            for indices, pixels in batches:
                labels = self._labels[torch.from_numpy(indices.records)]
                filling = int((indices.weights == 0).sum())
                weights = torch.from_numpy(indices.weights)
                yield StoredBatch({self.size: pixels}, [], weights, labels, filling, step=indices.step)

    def pixels(self, indices: BatchIndices) -> tuple[BatchIndices, Tensor]:
        """Return the batch indices, and the views of their images, (n, height, width, 3) uint8.

        Raises UserError, with the remedy, for an image that cannot be read.
        """
        views = []
        for number in self.numbers[indices.records].tolist():
            try:
                image = self.files.read(number)
            except UserError as error:
                advice = "repair it, or leave out all such images with --on-error skip"
                raise UserError(f"{error}; {advice}") from error
            if self._views is None:
                view = crop_view(1.0, image.size, self.size)
            else:
                view = draw_view(self._views, self.files.images.keys[number], indices.epoch, image.size)
            views.append(apply_view(image, view, self.size))
        return indices, torch.from_numpy(np.stack(views))

    def batches(self, stored: StoredBatch, students: Sequence[Backbone]) -> list[Batch]:
        """Return a Batch on the device for every student, of a stored one that is there."""
        made = stored.batches((), students)
        if self._mixing is None:
            return [replace(batch, labels=mixup_target(batch.labels, self.classes)) for batch in made]
        return [self._mixing(batch, stored.step) for batch in made]


def views_of(settings: FinetuneConfig, size: ImageSize) -> ViewsConfig:
    """Return what views are drawn with; the epoch is their number."""
    return ViewsConfig(
        kind="random-resized-crop", shape=size, scale=settings.scale, ratio=settings.ratio, flip=settings.flip,
        color=settings.color, seed=settings.seed,
    )  # fmt: skip
