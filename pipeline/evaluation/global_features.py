"""Features of images from the last block: CLS, the mean patch, or all patches."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.evaluation.context import EvaluationContext, Features, kinds_of
from pipeline.evaluation.feature_rows import empty_rows
from pipeline.evaluation.feature_store import stored_features
from pipeline.evaluation.model_inputs import compute_tokens
from pipeline.models.backbone import Backbone
from pipeline.runtime.progress import say

Name = Literal["cls", "mean_patch", "patches"]


def global_features(context: EvaluationContext, images: Images) -> Features:
    """Return the global features of the images; the first task that needs them computes them."""
    key = images.paths, images.place_hash()
    if key not in context.computed:
        context.computed[key] = features(context.backbone, images, context.settings, context.device)
    return context.computed[key]


def features(backbone: Backbone, images: Images, settings: EvaluateConfig, device: torch.device) -> Features:
    """Compute the features of every kind in evaluate.tokens, in one pass of the model over the images."""
    kinds = kinds_of(backbone, settings)
    names: tuple[Name, ...] = ("cls", "mean_patch") if backbone.has_cls else ("mean_patch",)
    if settings.features is None:
        found: Features = {kind: {name: empty_rows((len(images), backbone.width)) for name in names} for kind in kinds}
        for _ in _filled(found, 0, feature_batches(backbone, images, settings, device, kinds, names)):
            pass
        return found
    with stored_features(settings.features, backbone, images, settings, list(kinds), names) as stored:
        if stored.done:
            say(f"{stored.done} of {len(images)} images have their features in {settings.features}")
        if stored.done < len(images):
            rest = images.select(np.arange(stored.done, len(images)))
            batches = feature_batches(backbone, rest, settings, device, kinds, names)
            for done in _filled(stored.rows, stored.done, batches):
                stored.advance(done)
    return stored.rows


def _filled(found: Features, done: int, batches: Iterator[Features]) -> Iterator[int]:
    """Put batches into rows of features, from row `done` on; yield after each how many rows are there."""
    for batch in batches:
        count = len(next(iter(next(iter(batch.values())).values())))
        for kind, named in batch.items():
            for name, rows in named.items():
                found[kind][name][done : done + count] = rows
        done += count
        yield done


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
    for raw in compute_tokens(backbone, images, settings, device, settings.crop):
        yield {
            kind: {name: _part(convert(raw), name, backbone.prefix).float().cpu() for name in names}
            for kind, convert in kinds.items()
        }


def _part(x: Tensor, name: Name, prefix: int) -> Tensor:
    if name == "cls":
        return x[:, 0]
    return x[:, prefix:].mean(1) if name == "mean_patch" else x[:, prefix:]
