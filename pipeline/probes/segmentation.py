"""Linear segmentation on patch tokens: shards with NAME.seg.png, one class number a pixel, beside NAME.jpg.

The model sees the whole frame, squeezed into its square. A linear layer on standardised tokens gives logits on the
patch grid, which are upsampled bilinearly: for training to a grid of labels read by nearest neighbour, for testing to
the mask itself. Nothing is selected on the test shards: the learning rate is chosen on a split of the training shards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import EvaluateConfig
from pipeline.prefetch import prefetch
from pipeline.probes.trial import EvaluateResult, Trial, tokens
from pipeline.progress import meter
from pipeline.shards import ImageFile, Images, decode, index_beside
from pipeline.views import View
from singer.probes import class_iou, confusion

MASK = "seg.png"
# The label of pixels that do not count, whatever it is in the masks.
VOID = -1
_FIT_SHARE = 0.8
# Side of the training labels, in patches.
_LABELS_A_PATCH = 2
_BATCH = 16
_WEIGHT_DECAY = 1e-2
# Where a PNG has its bits a sample.
_BIT_DEPTH_AT = 24


@dataclass(frozen=True, kw_only=True)
class Segmentation(EvaluateResult):
    """Figures (%) over all pixels of the test images that count. lr: the learning rate that was chosen.

    miou: the mean of class_iou, which is None for classes that neither masks nor predictions have.
    """

    miou: float
    pixel_accuracy: float
    class_iou: list[float | None]
    classes: int
    lr: float


def probe(trial: Trial) -> Segmentation:
    """Raises ValueError for missing and unusable masks, labels out of range, and if seg_classes is not set."""
    settings, classes = trial.settings, trial.settings.seg_classes
    if classes is None:
        raise ValueError("--task segmentation needs evaluate.seg_classes, the number of classes in the masks")
    train_masks, test_masks = index_beside(trial.train, MASK), index_beside(trial.test, MASK)
    # All masks are read before the model runs, so that a bad one is known at once.
    if not sum(np.any(mask != VOID) for mask in read_masks(trial.test, test_masks, settings)):
        raise ValueError(f"--test: no mask has a label besides evaluate.seg_ignore={settings.seg_ignore}")
    side = _LABELS_A_PATCH * int(trial.vit.model.patch_embed.grid_size[0])
    labels = torch.from_numpy(
        np.stack([nearest(mask, side) for mask in read_masks(trial.train, train_masks, settings)])
    )
    if not (labels != VOID).any():
        raise ValueError(f"--train: no mask has a label besides evaluate.seg_ignore={settings.seg_ignore}")

    x = torch.cat([patches.cpu() for patches in patch_tokens(trial, trial.train)])
    head, lr = fit_head(x, labels, classes, settings, trial.device)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    patches = (image for batch in patch_tokens(trial, trial.test) for image in batch)
    for image, mask in zip(patches, read_masks(trial.test, test_masks, settings), strict=True):
        counts += count_pixels(head, image, torch.from_numpy(mask), classes)

    iou = class_iou(counts)
    return Segmentation(
        model=trial.model,
        train_images=len(trial.train),
        test_images=len(trial.test),
        seconds=trial.seconds,
        written=trial.file,
        miou=100 * float(iou.nanmean()),
        pixel_accuracy=100 * float(counts.diagonal().sum() / counts.sum()),
        class_iou=[None if np.isnan(share) else 100 * share for share in iou.tolist()],
        classes=classes,
        lr=lr,
    )


def patch_tokens(trial: Trial, images: Images) -> Iterator[Tensor]:
    """Patch tokens (B, patches, d) of whole frames, batch by batch."""

    def whole(image: Image.Image) -> View:
        return View((0.0, 0.0, 1.0, 1.0))

    for x in tokens(trial.vit, images, trial.settings, trial.device, whole):
        yield x[:, trial.vit.prefix :].float()


def read_masks(images: Images, masks: Images, settings: EvaluateConfig) -> Iterator[np.ndarray]:
    """The masks in full, (H, W) int16 with VOID for evaluate.seg_ignore. Raises ValueError naming key and shard."""
    with ImageFile(images) as image_files, ImageFile(masks, "mask") as files:

        def load(number: int) -> np.ndarray:
            return _read_mask(image_files.dimensions(number), *files.encoded(number), settings)

        yield from prefetch(load, range(len(images)), settings.workers)


def _read_mask(size: tuple[int, int], data: bytes, where: str, settings: EvaluateConfig) -> np.ndarray:
    """size: (width, height) of the image; data: the encoded mask; where: its key and shard, for messages."""
    image = decode(data, where, ("PNG",))
    # PIL multiplies greys of fewer bits to fill the range to 255: other labels.
    if image.mode not in ("L", "P") or (image.mode == "L" and data[_BIT_DEPTH_AT] != 8):
        raise ValueError(f"{where} holds no class numbers; store it as a PNG of 8-bit grey or with a palette")
    if image.size != size:
        width, height = image.size
        raise ValueError(f"{where} has {width} x {height} pixels, its image {size[0]} x {size[1]}; make them alike")
    mask = np.asarray(image).astype(np.int16)
    mask[mask == settings.seg_ignore] = VOID
    most = int(mask.max())
    assert settings.seg_classes is not None
    if most >= settings.seg_classes:
        raise ValueError(
            f"{where} has label {most}, but evaluate.seg_classes={settings.seg_classes} allows "
            f"0 to {settings.seg_classes - 1} besides evaluate.seg_ignore={settings.seg_ignore}; correct one of them"
        )
    return mask


def nearest(mask: np.ndarray, side: int) -> np.ndarray:
    """(H, W) -> (side, side): the labels in the middle of each cell; labels cannot be averaged."""
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(np.int64) for length in mask.shape)
    cells: np.ndarray = mask[rows[:, None], columns]
    return cells


@dataclass(frozen=True)
class Head:
    """A linear layer on standardised tokens. mean, std: (d,); weight: (classes, d); bias: (classes,)."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, patches, d) on a square grid -> (B, classes, *size), upsampled bilinearly."""
        grid = round(x.shape[1] ** 0.5)
        logits = F.linear((x - self.mean) / self.std, self.weight, self.bias)
        return _upsample(logits.transpose(1, 2).unflatten(2, (grid, grid)), size)


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, (..., h, w) -> (..., *size). As two matrix products, its gradient is deterministic on every device."""
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, mode="linear")[0]
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    return rows.T @ maps @ columns


def fit_head(
    x: Tensor, labels: Tensor, classes: int, settings: EvaluateConfig, device: torch.device
) -> tuple[Head, float]:
    """A head, and its learning rate: the one of seg_lrs with the best mIoU on a held-out fifth of the images.

    x: (n, patches, d); labels: (n, side, side), VOID where they do not count. All images are used in the end.
    """
    lr = settings.seg_lrs[0]
    if len(settings.seg_lrs) > 1:
        if len(x) < 2:
            raise ValueError("--train has one image only; give more, or one learning rate in evaluate.seg_lrs")
        split = train_test_split(np.arange(len(x)), train_size=_FIT_SHARE, random_state=settings.seed)
        fit, held_out = map(torch.from_numpy, split)
        heads = train_heads(x[fit], labels[fit], classes, settings.seg_lrs, settings, device)
        held = [(x[i].to(device), labels[i]) for i in held_out.tolist()]
        counts = [torch.stack([count_pixels(head, *pair, classes) for pair in held]).sum(0) for head in heads]
        lr = settings.seg_lrs[int(np.argmax([float(class_iou(c).nanmean()) for c in counts]))]
    (head,) = train_heads(x, labels, classes, (lr,), settings, device)
    return head, lr


def train_heads(
    x: Tensor, labels: Tensor, classes: int, lrs: Sequence[float], settings: EvaluateConfig, device: torch.device
) -> list[Head]:
    """A head for every learning rate, all from the same batches: AdamW from zero, cosine decay, a loss a pixel."""
    std, mean = torch.std_mean(x, dim=(0, 1), correction=0)
    mean, std = mean.to(device), std.clamp(min=1e-6).to(device)
    width, side = x.shape[2], labels.shape[1]
    weights = [torch.zeros(classes, width, device=device, requires_grad=True) for _ in lrs]
    biases = [torch.zeros(classes, device=device, requires_grad=True) for _ in lrs]
    groups = [{"params": [w, b], "lr": lr} for w, b, lr in zip(weights, biases, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    steps = settings.seg_passes * -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(settings.seed)
    with meter("segmentation head", settings.seg_passes, "passes") as m:
        for _ in range(settings.seg_passes):
            for rows in torch.randperm(len(x), generator=order).split(_BATCH):
                # The heads as one layer, which is faster; each has a loss, and so gradients, of its own.
                together = Head(mean, std, torch.cat(weights), torch.cat(biases))
                logits = together.logits(x[rows].to(device), (side, side)).reshape(-1, classes, side, side)
                target = labels[rows].to(device).long()
                each = target.repeat_interleave(len(lrs), dim=0)
                losses = F.cross_entropy(logits, each, ignore_index=VOID, reduction="sum")
                optimizer.zero_grad()
                (losses / (target != VOID).sum().clamp(min=1)).backward()
                optimizer.step()
                schedule.step()
            m.advance(1)
    return [Head(mean, std, w.detach(), b.detach()) for w, b in zip(weights, biases, strict=True)]


def count_pixels(head: Head, x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The confusion matrix (classes, classes) of an image: tokens (patches, d), labels (H, W); on the CPU."""
    height, width = labels.shape
    predicted = head.logits(x[None], (height, width))[0].argmax(0).cpu()
    return confusion(predicted, labels, classes)
