"""What every task of `singer evaluate` is given, what it gives back, and the features of a frozen model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.models import Backbone
from pipeline.prefetch import prefetch
from pipeline.progress import meter
from pipeline.shards import ImageFile, Images
from pipeline.views import View, apply_view, normalise
from singer.backbones import block_outputs, depth


@dataclass(frozen=True)
class Trial:
    """A frozen model, the images that a task learns from and those that it is tested on.

    model: what the user named; vit: the model itself, on `device`; learn_from: the images of --train, if given;
    started: time.perf_counter() at the start of the stage; file: where the figures will be stored, if anywhere.
    """

    model: Path | str
    vit: Backbone
    device: torch.device
    learn_from: Images | None
    test: Images
    settings: EvaluateConfig
    started: float
    file: Path | None

    @property
    def train(self) -> Images:
        """Raises ValueError if there are none: only a task that learns asks for them."""
        if self.learn_from is None:
            raise ValueError("this task learns from images; give --train")
        return self.learn_from

    @property
    def seconds(self) -> float:
        """Since the start of the stage."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """What the results of all tasks have; each adds its figures."""

    model: Path | str
    train_images: int
    test_images: int
    seconds: float
    written: Path | None


# Probes the model and tests the probe. Raises ValueError for what the user can mend.
Task = Callable[[Trial], EvaluateResult]


def tokens(
    vit: Backbone, images: Images, settings: EvaluateConfig, device: torch.device, view: Callable[[Image.Image], View]
) -> Iterator[Tensor]:
    """All tokens (B, P + patches, d) of the last block, batch by batch, on the device and without gradients.

    view: the part of an image that the model sees.
    """
    last = depth(vit.model) - 1
    if settings.tokens == "norm" and not vit.is_vit:
        raise ValueError("evaluate.tokens norm is for ViTs; of other models take block")
    for batch in inputs(vit, images, settings, device, view):
        with torch.no_grad():
            x = block_outputs(vit.model, batch, [last])[last]
            if settings.tokens == "norm":
                # Models that pool before their norm have it as fc_norm.
                x = vit.model.fc_norm(vit.model.norm(x))
        yield x


def inputs(
    vit: Backbone, images: Images, settings: EvaluateConfig, device: torch.device, view: Callable[[Image.Image], View]
) -> Iterator[Tensor]:
    """Views of the images as the model takes them (B, 3, size, size), normalised, batch by batch on the device."""
    batches = [
        np.arange(i, min(i + settings.batch_size, len(images))) for i in range(0, len(images), settings.batch_size)
    ]
    with ImageFile(images) as files, meter("features", len(images), "images") as m:

        def load(numbers: np.ndarray) -> Tensor:
            views = []
            for number in numbers:
                image = files.read(int(number))
                views.append(apply_view(image, view(image), vit.image_size))
            return torch.from_numpy(np.stack(views))

        for pixels in prefetch(load, batches, settings.workers, m):
            yield normalise(pixels, vit.mean, vit.std, device)
            m.advance(len(pixels))
