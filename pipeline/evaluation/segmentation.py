"""Linear segmentation on patch tokens: shards with NAME.seg.png, one class number a pixel, beside NAME.jpg.

For training, logits are upsampled to a grid of labels read by nearest neighbour, for testing to the mask itself.
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
    LinearHead,
    PixelLesson,
    label_side,
    nearest,
    of_every_kind,
    patch_tokens,
    read_maps,
)
from singer.errors import UserError
from singer.metrics import class_iou, confusion

MASK = "seg.png"
# The label of pixels that do not count, whatever it is in the masks.
VOID = -1
# Where a PNG has its bits a sample.
_BIT_DEPTH_AT = 24


@dataclass(frozen=True, kw_only=True)
class Segmentation(EvaluateResult):
    """Figures (%) over all pixels of the test images that count. lr: the learning rate that was chosen.

    miou: the mean of class_iou, which is None for classes that neither masks nor predictions have; normed: the same
    figures of normed tokens.
    """

    classes: int
    miou: float
    pixel_accuracy: float
    class_iou: list[float | None]
    lr: float
    normed: dict[str, Any] | None


def probe(context: EvaluationContext) -> Segmentation:
    """Raises UserError for missing and unusable masks, labels out of range, and if seg_classes is not set."""
    settings = context.settings
    classes, train_masks, test_masks = find_masks(context.train, context.test, settings)
    # All masks are read before the model runs, so that a bad one is known at once.
    require_label("--test", context.test, test_masks, settings)
    side = label_side(context)
    labels = torch.from_numpy(
        np.stack([nearest(mask, side) for mask in read_masks(context.train, train_masks, settings)])
    )
    if not (labels != VOID).any():
        raise UserError(f"--train: no mask has a label besides evaluate.seg_ignore={settings.seg_ignore}")

    x = torch.cat([patches.cpu() for patches in patch_tokens(context, context.train)])
    heads = {
        kind: fit_head(tokens, labels, classes, settings, context.device) for kind, tokens in of_every_kind(context, x)
    }
    counts = {kind: torch.zeros(classes, classes, dtype=torch.int64) for kind in heads}
    patches = (image for batch in patch_tokens(context, context.test) for image in batch)
    for image, mask in zip(patches, read_masks(context.test, test_masks, settings), strict=True):
        for kind, (head, _) in heads.items():
            counts[kind] += count_pixels(head, context.kinds[kind](image), torch.from_numpy(mask), classes)

    first, normed = first_and_normed({kind: _figures(counts[kind], lr) for kind, (_, lr) in heads.items()})
    return Segmentation(
        model=context.model,
        train_images=len(context.train),
        test_images=len(context.test),
        seconds=context.seconds,
        written=context.file,
        classes=classes,
        **first,
        normed=normed,
    )


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Raise UserError as `probe`, for which all masks are read."""
    _, train_masks, test_masks = find_masks(train, test, settings)
    require_label("--train", train, train_masks, settings)
    require_label("--test", test, test_masks, settings)


def find_masks(train: Images, test: Images, settings: EvaluateConfig) -> tuple[int, Images, Images]:
    """(classes, masks of --train, those of --test). Raises UserError where a mask or seg_classes is missing."""
    if settings.seg_classes is None:
        raise UserError("--task segmentation needs evaluate.seg_classes, the number of classes in the masks")
    return settings.seg_classes, index_beside(train, MASK), index_beside(test, MASK)


def require_label(what: str, images: Images, masks: Images, settings: EvaluateConfig) -> None:
    """Raise UserError for a mask that cannot be used, and if none has a label that counts."""
    if not sum(np.any(mask != VOID) for mask in read_masks(images, masks, settings)):
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
    """The masks in full, (H, W) int16 with VOID for evaluate.seg_ignore. Raises UserError naming key and shard."""

    def classes_of(image: Image.Image, data: bytes, where: str) -> np.ndarray:
        # PIL multiplies greys of fewer bits to fill the range to 255: other labels.
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
    """A head, and its learning rate: the one of seg_lrs with the best mIoU on a held-out fifth of the images.

    x: (n, patches, d); labels: (n, side, side), VOID where they do not count.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(logits, target.long(), ignore_index=VOID, reduction="sum")
        return total / (target != VOID).sum().clamp(min=1)

    def score(head: LinearHead, held_out: Iterable[tuple[Tensor, Tensor]]) -> float:
        counts = torch.stack([count_pixels(head, *pair, classes) for pair in held_out]).sum(0)
        return float(class_iou(counts).nanmean())

    lesson = PixelLesson("seg", classes, loss, score, settings.seg_lrs, settings.seg_passes, settings.seed)
    return dense.fit_head(x, labels, lesson, device)


def count_pixels(head: LinearHead, x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The confusion matrix (classes, classes) of an image: tokens (patches, d), labels (H, W); on the CPU."""
    height, width = labels.shape
    predicted = head.maps(x[None], (height, width))[0].argmax(0).cpu()
    return confusion(predicted, labels, classes)
