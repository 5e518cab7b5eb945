"""Linear depth on patch tokens.

The shards hold NAME.depth.png, in uint16 millimeters (0: missing), beside NAME.jpg. There are two heads. `bins` gives
weights to depths that are spread evenly over evaluate.depth_min to depth_max, as in AdaBins and DINOv2's linear head;
its loss is the scale-invariant logarithmic loss. `regression` gives the depth itself, standardised by the mean and
deviation of the training maps; its loss is L1. The heads learn on a grid of depths read by nearest neighbour; in
testing, this grid is upsampled bilinearly to the size of the map. Pixels that are missing or outside the range never
count.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.data import Images, index_beside
from pipeline.evaluation.context import EvaluateResult, EvaluationContext, first_and_normed
from pipeline.evaluation.dense import (
    HeadSpec,
    LinearHead,
    fit_head,
    label_size,
    nearest,
    of_every_kind,
    patch_tokens,
    read_maps,
    train_tokens,
    upsample,
)
from singer.errors import UserError
from singer.metrics import depth_figures, depth_sums, expected_depth, l1_loss, silog_loss

MAP = "depth.png"
_MILLIMETERS = np.float32(1000)
# If the initial weights of the bins were 0, relu would pass no gradient.
_SPREAD_OF_BINS = 0.01

# Tokens (patches, d) and a size (H, W) -> depth (H, W) in meters, on the CPU.
Predictor = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Depth(EvaluateResult):
    """Figures of both heads over all pixels that count, at the maps' own resolution, as in depth_figures.

    The figures of each head also hold lr, the learning rate that was chosen. pixels: how many pixels count; normed:
    the same figures, measured on normed tokens.
    """

    pixels: int
    bins: dict[str, float]
    regression: dict[str, float]
    normed: dict[str, dict[str, float]] | None


def probe(context: EvaluationContext) -> Depth:
    """Train both heads on --train and return their figures on --test.

    Raises UserError as `check` does, and if no pixel counts at the resolution of the probe.
    """
    settings, cells = context.settings, label_size(context)
    train_maps, test_maps = index_beside(context.train, MAP), index_beside(context.test, MAP)
    labels = torch.from_numpy(
        np.stack([nearest(depth, cells) for depth in read_depths(context.train, train_maps, settings)])
    )
    require_pixels("--train", int(labels.count_nonzero()), settings)

    x = train_tokens(context)
    heads = {kind: fit_heads(tokens, labels, settings, context.device) for kind, tokens in of_every_kind(context, x)}
    sums = {kind: {name: torch.zeros(4, dtype=torch.float64) for name in both} for kind, both in heads.items()}
    patches, pixels = (image for batch in patch_tokens(context, context.test) for image in batch), 0
    for image, depth in zip(patches, read_depths(context.test, test_maps, settings), strict=True):
        pixels += int(np.count_nonzero(depth))
        size, true = (depth.shape[0], depth.shape[1]), torch.from_numpy(depth)
        for kind, both in heads.items():
            tokens = context.kinds[kind](image)
            for name, (predict, _) in both.items():
                sums[kind][name] += depth_sums(predict(tokens, size), true)

    first, normed = first_and_normed(
        {
            kind: {name: {**depth_figures(sums[kind][name]), "lr": lr} for name, (_, lr) in both.items()}
            for kind, both in heads.items()
        }
    )
    return context.result(Depth, len(context.train), pixels=pixels, **first, normed=normed)


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Read all maps.

    Raises UserError if one is missing or cannot be used, or if no map has a pixel that counts.
    """
    for what, images in (("--train", train), ("--test", test)):
        depths = read_depths(images, index_beside(images, MAP), settings)
        require_pixels(what, sum(int(np.count_nonzero(depth)) for depth in depths), settings)


def require_pixels(what: str, count: int, settings: EvaluateConfig) -> None:
    """Raise UserError if `count` is 0; `what` is the option that gave the images."""
    if not count:
        raise UserError(
            f"{what}: no depth map has a value from evaluate.depth_min={settings.depth_min} to "
            f"depth_max={settings.depth_max} meters; correct the maps or the range"
        )


def read_depths(images: Images, maps: Images, settings: EvaluateConfig) -> Iterator[np.ndarray]:
    """Yield the depth maps in full: (H, W) float32 in meters, 0 where a pixel does not count.

    Raises UserError, with key and shard, if a map cannot be used.
    """

    def meters(image: Image.Image, _: bytes, where: str) -> np.ndarray:
        # PIL opens images of 16-bit grey, and only these, in this mode.
        if image.mode != "I;16":
            raise UserError(f"{where} holds no millimeters; store it as a PNG of 16-bit grey")
        depth = np.asarray(image) / _MILLIMETERS
        depth[(depth < settings.depth_min) | (depth > settings.depth_max)] = 0
        return depth

    return read_maps(images, maps, "depth map", meters, settings.workers)


@dataclass(frozen=True)
class HeadForm:
    """How a head gives depth.

    outputs: the number of its maps; decode: makes depth (B, h, w) of its maps (B, outputs, h, w); loss: compares depth
    with labels; spread: standard deviation of its initial weights.
    """

    outputs: int
    decode: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    spread: float = 0.0


def fit_heads(
    x: Tensor, labels: Tensor, settings: EvaluateConfig, device: torch.device
) -> dict[str, tuple[Predictor, float]]:
    """Return {name: (predictor, learning rate)} of both heads.

    x: (n, patches, d); labels: (n, H, W) in meters, 0 where a pixel does not count. The learning rate is the one
    of depth_lrs with the least RMSE on a held-out fifth of the images.
    """
    seen = labels[labels > 0]
    std, mean = (float(value) for value in torch.std_mean(seen, correction=0))
    least, most = settings.depth_min, settings.depth_max
    forms = {
        "bins": HeadForm(
            settings.depth_bins, lambda maps: expected_depth(maps, least, most), silog_loss, _SPREAD_OF_BINS
        ),
        "regression": HeadForm(1, lambda maps: mean + std * maps[:, 0], l1_loss),
    }
    return {name: _fit(x, labels, form, settings, device) for name, form in forms.items()}


def _fit(
    x: Tensor, labels: Tensor, form: HeadForm, settings: EvaluateConfig, device: torch.device
) -> tuple[Predictor, float]:
    """Return the predictor of a head of one form, and its learning rate."""
    grid = (labels.shape[1], labels.shape[2])

    def predict(head: LinearHead, image: Tensor, size: tuple[int, int]) -> Tensor:
        depth = upsample(form.decode(head.maps(image[None], grid)), size)[0]
        return depth.clamp(settings.depth_min, settings.depth_max).cpu()

    def score(head: LinearHead, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
        sums = [depth_sums(predict(head, image, grid), depth) for image, depth in held_out]
        return -depth_figures(torch.stack(sums).sum(0))["rmse"]

    spec = HeadSpec(
        name="depth",
        outputs=form.outputs,
        loss=lambda maps, target: form.loss(form.decode(maps), target),
        score=score,
        lrs=settings.depth_lrs,
        passes=settings.depth_passes,
        seed=settings.seed,
        spread=form.spread,
    )
    head, lr = fit_head(x, labels, spec, device)
    return partial(predict, head), lr
