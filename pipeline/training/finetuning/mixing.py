"""Mix the images and labels of a batch by Mixup and CutMix, which is a pure function of the seed and the step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target

from pipeline.config import FinetuneConfig
from pipeline.training.batch import Batch


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

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch with labels (B,) mixed: its labels are shares of classes (B, classes).

        Pixels are mixed before they are normalised, which is the same: the shares of two images add up to 1.
        """
        ((size, pixels),) = batch.pixels.items()
        shares = mixup_target(batch.labels, self._classes, smoothing=self._smoothing)
        paired = (len(pixels) - batch.filling) // 2 * 2
        if self._mixup is not None and paired:
            # timm mixes the first image with the last one, and so on.
            numbers = torch.arange(paired, device=pixels.device)
            order = torch.cat([numbers[::2], numbers[1::2].flip(0)])
            with _numpy_seed(self._seed, batch.step):
                images, targets = self._mixup(pixels[order].permute(0, 3, 1, 2).float(), batch.labels[order])
            pixels = pixels.float().index_copy(0, order, images.permute(0, 2, 3, 1))
            shares = shares.index_copy(0, order, targets)
        return replace(batch, pixels={size: pixels}, labels=shares)


@contextmanager
def _numpy_seed(*words: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which timm draws, and restore it."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(words)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
