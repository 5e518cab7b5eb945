"""Global features of images, for the tasks with one label an image: CLS and the mean patch of the last block."""

import torch
from PIL import Image
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.data.views import View, crop_view
from pipeline.evaluation.context import EvaluationContext, Features, kinds_of, tokens
from pipeline.teachers.backbone import Backbone


def pooled(context: EvaluationContext, images: Images) -> Features:
    """Return the global features of the images; the first task that needs them computes them."""
    key = images.paths, images.place_hash()
    if key not in context.computed:
        context.computed[key] = features(context.vit, images, context.settings, context.device)
    return context.computed[key]


def features(vit: Backbone, images: Images, settings: EvaluateConfig, device: torch.device) -> Features:
    """Compute the features of every kind in evaluate.tokens, in one pass of the model over the images."""

    def view(image: Image.Image) -> View:
        return crop_view(settings.crop, image.size)

    kinds = kinds_of(vit, settings)
    names = ("cls", "mean_patch") if vit.has_cls else ("mean_patch",)
    parts: dict[str, dict[str, list[Tensor]]] = {kind: {name: [] for name in names} for kind in kinds}
    for raw in tokens(vit, images, settings, device, view):
        for kind, convert in kinds.items():
            x = convert(raw)
            parts[kind]["mean_patch"].append(x[:, vit.prefix :].mean(1).float().cpu())
            if vit.has_cls:
                parts[kind]["cls"].append(x[:, 0].float().cpu())
    return {kind: {name: torch.cat(rows) for name, rows in named.items()} for kind, named in parts.items()}
