"""Linear segmentation on patch tokens.

The shards hold NAME.seg.png, with one class number a pixel, beside NAME.jpg. In training, logits are upsampled to a
grid of labels that is read by nearest neighbour; in testing, they are upsampled to the size of the mask.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import EvaluateConfig
from pipeline.data import Images, index_beside
from pipeline.evaluation import dense
from pipeline.evaluation.context import EvaluateResult, EvaluationContext, first_and_normed
from pipeline.evaluation.dense import (
    HeadSpec,
    LinearHead,
    label_size,
    nearest,
    of_every_kind,
    patch_tokens,
    read_maps,
    train_tokens,
)
from singer.errors import UserError
from singer.metrics import class_iou, confusion

MASK = "seg.png"
# The label of pixels that do not count; evaluate.seg_ignore is their label in the masks.
VOID = -1
# The offset of the byte that holds a PNG's bits per sample.
_BIT_DEPTH_AT = 24


@dataclass(frozen=True, kw_only=True)
class Segmentation(EvaluateResult):
    """Figures (%) over all pixels of the test images that count.

    miou: the mean of class_iou; class_iou: None for classes that neither masks nor predictions have; lr: the learning
    rate that was chosen; normed: the same figures, measured on normed tokens.
    """

    classes: int
    miou: float
    pixel_accuracy: float
    class_iou: list[float | None]
    lr: float
    normed: dict[str, Any] | None


def probe(context: EvaluationContext) -> Segmentation:
    """Train a linear head on --train and return its figures on --test.

    Raises UserError as `check` does, and if no label is left at the resolution of the probe.
    """
    settings = context.settings
    classes, train_masks, test_masks = find_masks(context.train, context.test, settings)
    cells = label_size(context)
    labels = torch.from_numpy(
        np.stack([nearest(mask, cells) for mask in read_masks(context.train, train_masks, settings)])
    )
    require_label("--train", [labels.numpy()], settings)

    x = train_tokens(context)
    heads = {
        kind: fit_head(tokens, labels, classes, settings, context.device) for kind, tokens in of_every_kind(context, x)
    }
    counts = {kind: torch.zeros(classes, classes, dtype=torch.int64) for kind in heads}
    patches = (image for batch in patch_tokens(context, context.test) for image in batch)
    for image, mask in zip(patches, read_masks(context.test, test_masks, settings), strict=True):
        for kind, (head, _) in heads.items():
            counts[kind] += count_pixels(head, context.kinds[kind](image), torch.from_numpy(mask), classes)

    first, normed = first_and_normed({kind: _figures(counts[kind], lr) for kind, (_, lr) in heads.items()})
    return context.result(Segmentation, len(context.train), classes=classes, **first, normed=normed)


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Read all masks.

    Raises UserError if one is missing or cannot be used, if a label is out of range, or if seg_classes is not set.
    """
    _, train_masks, test_masks = find_masks(train, test, settings)
    require_label("--test", read_masks(test, test_masks, settings), settings)
    require_label("--train", read_masks(train, train_masks, settings), settings)


def find_masks(train: Images, test: Images, settings: EvaluateConfig) -> tuple[int, Images, Images]:
    """Return (classes, masks of --train, masks of --test).

    Raises UserError if a mask or evaluate.seg_classes is missing.
    """
    if settings.seg_classes is None:
        raise UserError("--task segmentation needs evaluate.seg_classes, the number of classes in the masks")
    return settings.seg_classes, index_beside(train, MASK), index_beside(test, MASK)


def require_label(what: str, masks: Iterable[np.ndarray], settings: EvaluateConfig) -> None:
    """Read all masks. Raises UserError if none has a label that counts; `what` is the option that gave the images."""
    if not sum(np.any(mask != VOID) for mask in masks):
        raise UserError(f"{what}: no mask has a label besides evaluate.seg_ignore={settings.seg_ignore}")


def _figures(counts: Tensor, lr: float) -> dict[str, Any]:
    iou = class_iou(counts)
    return {
        "miou": 100 * float(iou.nanmean()),
        "pixel_accuracy": 100 * float(counts.diagonal().sum() / counts.sum()),
        "class_iou": [None if np.isnan(share) else 100 * share for share in iou.tolist()],
        "lr": lr,
    }


def read_masks(images: Images, masks: Images, settings: EvaluateConfig) -> Iterator[np.ndarray]:
    """Yield the masks in full: (H, W) int16, with VOID for evaluate.seg_ignore.

    Raises UserError, with key and shard, if a mask cannot be used.
    """

    def classes_of(image: Image.Image, data: bytes, where: str) -> np.ndarray:
        # PIL scales grey of fewer bits up to 255, which changes the labels.
        if image.mode not in ("L", "P") or (image.mode == "L" and data[_BIT_DEPTH_AT] != 8):
            raise UserError(f"{where} holds no class numbers; store it as a PNG of 8-bit grey or with a palette")
        mask = np.asarray(image).astype(np.int16)
        mask[mask == settings.seg_ignore] = VOID
        most = int(mask.max())
        assert settings.seg_classes is not None
        if most >= settings.seg_classes:
            raise UserError(
                f"{where} has label {most}, but evaluate.seg_classes={settings.seg_classes} allows 0 to "
                f"{settings.seg_classes - 1} besides evaluate.seg_ignore={settings.seg_ignore}; correct one of them"
            )
        return mask

    return read_maps(images, masks, "mask", classes_of, settings.workers)


def fit_head(
    x: Tensor, labels: Tensor, classes: int, settings: EvaluateConfig, device: torch.device
) -> tuple[LinearHead, float]:
    """Return a trained head and its learning rate.

    x: (n, patches, d); labels: (n, H, W), VOID where a pixel does not count. The learning rate is the one of
    seg_lrs with the best mIoU on a held-out fifth of the images.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(logits, target.long(), ignore_index=VOID, reduction="sum")
        return total / (target != VOID).sum().clamp(min=1)

    def score(head: LinearHead, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
        counts = torch.stack([count_pixels(head, *pair, classes) for pair in held_out]).sum(0)
        return float(class_iou(counts).nanmean())

    spec = HeadSpec("seg", classes, loss, score, settings.seg_lrs, settings.seg_passes, settings.seed)
    return dense.fit_head(x, labels, spec, device)


def count_pixels(head: LinearHead, x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix (classes, classes) of one image, on the CPU.

    x: tokens (patches, d); labels: (H, W).
    """
    height, width = labels.shape
    predicted = head.maps(x[None], (height, width))[0].argmax(0).cpu()
    return confusion(predicted, labels, classes)
