"""Images as a frozen model takes them, and the tokens and logits that it makes of them, batch by batch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.data import ImageFile, Images
from pipeline.data.views import View, apply_view, crop_view, normalise
from pipeline.models.backbone import Backbone
from pipeline.runtime.buffers import moved
from pipeline.runtime.devices import autocast
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter
from singer.backbones import block_outputs, depth
from singer.errors import UserError

_WHOLE = View((0.0, 0.0, 1.0, 1.0))


def load_inputs(
    backbone: Backbone,
    images: Images,
    settings: EvaluateConfig,
    device: torch.device,
    crop: float | None,
) -> Iterator[Tensor]:
    """Yield the views of the images as the model takes them: normalised (B, 3, H, W) batches on the device.

    crop: the share that is seen of the largest crop of the input's shape; None: the whole frame, resized.
    Raises UserError, with the remedy, for an image that cannot be read.
    """
    batches = [
        np.arange(i, min(i + settings.batch_size, len(images))) for i in range(0, len(images), settings.batch_size)
    ]
    with ImageFile(images) as files, meter("features", len(images), "images") as m:

        def load(numbers: np.ndarray) -> Tensor:
            views = []
            for number in numbers:
                try:
                    image = files.read(int(number))
                except UserError as error:
                    advice = "repair it, or leave out all such images with --on-error skip"
                    raise UserError(f"{error}; {advice}") from error
                size = backbone.image_size
                view = _WHOLE if crop is None else crop_view(crop, image.size, size)
                views.append(apply_view(image, view, size))
            return torch.from_numpy(np.stack(views))

        for pixels in prefetch(load, batches, settings.workers, m):
            yield normalise(moved(pixels, device), backbone.mean, backbone.std)
            m.advance(len(pixels))


def compute_tokens(
    backbone: Backbone,
    images: Images,
    settings: EvaluateConfig,
    device: torch.device,
    crop: float | None,
) -> Iterator[Tensor]:
    """Yield all raw tokens of the last block, batch by batch: (B, P + patches, d), P being the prefix tokens.

    They are float32, on the device and without gradients; the model computes in settings.precision. crop: see
    load_inputs.
    """
    last = depth(backbone.model) - 1
    for batch in load_inputs(backbone, images, settings, device, crop):
        with torch.no_grad(), autocast(device, settings.precision):
            x = block_outputs(backbone.model, batch, [last])[last]
        yield x.float()


def compute_head(
    backbone: Backbone,
    images: Images,
    settings: EvaluateConfig,
    device: torch.device,
    crop: float,
    pre_logits: bool = False,
) -> Iterator[Tensor]:
    """Yield what the head of a timm model gives, batch by batch: logits (B, classes), float32, without gradients.

    The model computes in settings.precision, and its head in float32: 16 bits would make the largest logits of an image
    equal. pre_logits: yield what the last layer of the head reads, (B, width). crop: see load_inputs.
    """
    model = backbone.model
    for batch in load_inputs(backbone, images, settings, device, crop):
        with torch.no_grad():
            with autocast(device, settings.precision):
                found = model.forward_features(batch)
            found = found.float() if isinstance(found, Tensor) else [x.float() for x in found]  # CoaT gives a list
            x = model.forward_head(found, pre_logits=pre_logits)
        yield x
