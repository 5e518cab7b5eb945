"""Features of images from the last block: CLS, the mean patch, or all patches."""

from collections.abc import Iterator
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.data.views import View, crop_view
from pipeline.evaluation.context import EvaluationContext, Features, kinds_of, tokens
from pipeline.models.backbone import Backbone

Name = Literal["cls", "mean_patch", "patches"]


def pooled(context: EvaluationContext, images: Images) -> Features:
    """Return the global features of the images; the first task that needs them computes them."""
    key = images.paths, images.place_hash()
    if key not in context.computed:
        context.computed[key] = features(context.backbone, images, context.settings, context.device)
    return context.computed[key]


def features(backbone: Backbone, images: Images, settings: EvaluateConfig, device: torch.device) -> Features:
    """Compute the features of every kind in evaluate.tokens, in one pass of the model over the images."""
    kinds = kinds_of(backbone, settings)
    names: tuple[Name, ...] = ("cls", "mean_patch") if backbone.has_cls else ("mean_patch",)
    parts: dict[str, dict[str, list[Tensor]]] = {kind: {name: [] for name in names} for kind in kinds}
    for batch in feature_batches(backbone, images, settings, device, kinds, names):
        for kind, named in batch.items():
            for name, rows in named.items():
                parts[kind][name].append(rows)
    return {kind: {name: torch.cat(rows) for name, rows in named.items()} for kind, named in parts.items()}


def feature_batches(
    backbone: Backbone,
    images: Images,
    settings: EvaluateConfig,
    device: torch.device,
    kinds: dict[str, nn.Module],
    names: tuple[Name, ...],
) -> Iterator[Features]:
    """Yield {kind: {name: features}} of the images, batch by batch, float32 on the CPU.

    kinds: as kinds_of returns them; names: "cls" and "mean_patch" are (B, d), "patches" (B, N, d) in row-major order.
    """

    def view(image: Image.Image) -> View:
        return crop_view(settings.crop, image.size, backbone.image_size)

    for raw in tokens(backbone, images, settings, device, view):
        yield {
            kind: {name: _part(convert(raw), name, backbone.prefix).float().cpu() for name in names}
            for kind, convert in kinds.items()
        }


def _part(x: Tensor, name: Name, prefix: int) -> Tensor:
    if name == "cls":
        return x[:, 0]
    return x[:, prefix:].mean(1) if name == "mean_patch" else x[:, prefix:]
