"""What the tasks with a value for every pixel share: linear heads on patch tokens, and the maps beside the images.

The model sees the whole frame, resized to its input. A linear layer on standardised tokens gives maps on the patch
grid, which are upsampled bilinearly. The test shards select nothing: the learning rate is chosen on a split of the
training shards.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from pipeline.data import ImageFile, Images, decode
from pipeline.evaluation.context import EvaluationContext
from pipeline.evaluation.feature_rows import empty_rows, moments
from pipeline.evaluation.model_inputs import compute_tokens
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter
from singer.errors import UserError
from singer.sizes import ImageSize, Size

# Along each side, the training labels have this many cells for one patch.
_LABELS_A_PATCH = 2
_FIT_SHARE = 0.8
_BATCH = 16
_WEIGHT_DECAY = 1e-2


def patch_tokens(context: EvaluationContext, images: Images) -> Iterator[Tensor]:
    """Yield the raw patch tokens (B, patches, d) of whole frames, batch by batch."""
    for x in compute_tokens(context.backbone, images, context.settings, context.device, None):
        yield x[:, context.backbone.prefix :].float()


def train_tokens(context: EvaluationContext) -> Tensor:
    """Return the raw patch tokens (n, patches, d) of the training images, in memory or in a file (see feature_rows)."""
    rows, columns = context.backbone.grid
    found, done = empty_rows((len(context.train), rows * columns, context.backbone.width)), 0
    for x in patch_tokens(context, context.train):
        found[done : done + len(x)] = x
        done += len(x)
    return found


def of_every_kind(context: EvaluationContext, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (kind, tokens) for raw tokens x (n, patches, d) on the CPU.

    Each kind overwrites the memory of x, so one kind must be used before the next is read.
    """
    for kind, convert in context.kinds.items():
        for part in x.split(_BATCH):
            part.copy_(convert(part.to(context.device)))
        yield kind, x


def label_size(context: EvaluationContext) -> Size:
    """Return the size of the maps that heads learn from, in pixels."""
    return Size(*(_LABELS_A_PATCH * patches for patches in context.backbone.grid))


def read_maps(
    images: Images, maps: Images, what: str, values: Callable[[Image.Image, bytes, str], np.ndarray], workers: int
) -> Iterator[np.ndarray]:
    """Yield the maps beside the images, in full resolution.

    what: the word for a map in messages; values: makes the array from a decoded PNG, its bytes and its name in
    messages. A map may have another resolution than its image. Raises UserError, with key and shard, if a map cannot be
    read or has another shape than its image.
    """
    with ImageFile(images) as image_files, ImageFile(maps, what) as files:

        def load(number: int) -> np.ndarray:
            data, where = files.encoded(number)
            image, size = decode(data, where, ("PNG",), maps.max_pixels), image_files.dimensions(number)
            array = values(image, data, where)
            if not same_shape(image.size, size):
                (w, h), (width, height) = image.size, size
                turned = "; images are turned as their EXIF says, so turn it, too" if same_shape((h, w), size) else ""
                raise UserError(
                    f"{where} has {w} x {h} pixels, but its image has {width} x {height}; give it the same ratio of "
                    f"width to height{turned}"
                )
            return array

        yield from prefetch(load, range(len(images)), workers)


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes (width, height) have the same ratio, within a pixel of the smaller one."""
    (w, h), (width, height) = sorted((one, other))
    return abs(h - w * height / width) <= 1 or abs(w - h * width / height) <= 1


def nearest(values: np.ndarray, size: ImageSize) -> np.ndarray:
    """Resize a map (H, W) to a size with the value in the middle of each cell.

    Labels and missing values cannot be averaged.
    """
    sides = zip(values.shape, Size.of(size), strict=True)
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(np.int64) for length, side in sides)
    cells: np.ndarray = values[rows[:, None], columns]
    return cells


@dataclass(frozen=True)
class LinearHead:
    """A linear layer on standardised tokens of a grid.

    mean, std: (d,); weight: (outputs, d); bias: (outputs,); grid: (rows, columns).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    grid: tuple[int, int]

    def maps(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the maps (B, outputs, *size) of patch tokens x (B, patches, d), upsampled bilinearly."""
        maps = F.linear((x - self.mean) / self.std, self.weight, self.bias)
        return upsample(maps.transpose(1, 2).unflatten(2, self.grid), size)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps (..., h, w) bilinearly to (..., *size).

    It is two matrix products, so that its gradient is deterministic on every device.
    """
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, mode="linear")[0]
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    return rows.T @ maps @ columns


@dataclass(frozen=True)
class HeadSpec:
    """What a head learns, and how.

    name: "seg" or "depth", the prefix of the keys in the section evaluate; outputs: the number of maps; loss: compares
    maps (B, outputs, H, W) with labels (B, H, W); score: rates a head on pairs of tokens (patches, d) and
    labels (H, W), and higher is better; lrs: learning rates to choose from; passes: passes over the training
    images; spread: standard deviation of the initial weights.
    """

    name: str
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[LinearHead, Iterable[tuple[Tensor, Tensor]]], float]
    lrs: Sequence[float]
    passes: int
    seed: int
    spread: float = 0.0


def fit_head(x: Tensor, labels: Tensor, spec: HeadSpec, device: torch.device) -> tuple[LinearHead, float]:
    """Return a trained head and its learning rate.

    x: (n, patches, d); labels: (n, H, W), of the shape of the grid. The learning rate is the one with the best score on
    a held-out fifth of the images. The head is then trained on all images. Raises UserError if there are several rates
    but one image.
    """
    lr = spec.lrs[0]
    if len(spec.lrs) > 1:
        if len(x) < 2:
            raise UserError(f"--train has one image only; give more, or one learning rate in evaluate.{spec.name}_lrs")
        split = train_test_split(np.arange(len(x)), train_size=_FIT_SHARE, random_state=spec.seed)
        fit, held_out = map(torch.from_numpy, split)
        heads = _train_heads(x, labels, fit, spec, spec.lrs, device)
        scores = [spec.score(head, ((x[i].to(device), labels[i]) for i in held_out.tolist())) for head in heads]
        # A head that diverged has no score, which argmax would take for the best one.
        lr = spec.lrs[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]
    (head,) = _train_heads(x, labels, torch.arange(len(x)), spec, (lr,), device)
    return head, lr


def _train_heads(
    x: Tensor, labels: Tensor, chosen: Tensor, spec: HeadSpec, lrs: Sequence[float], device: torch.device
) -> list[LinearHead]:
    """Return a head for every learning rate, trained by AdamW with cosine decay on the chosen images.

    All heads have the same initial weights and see the same batches.
    """
    found = moments(x[rows].flatten(0, 1) for rows in chosen.split(_BATCH))
    mean, std = (value.float().to(device) for value in found)
    std = std.clamp(min=1e-6)
    random = torch.Generator().manual_seed(spec.seed)
    start = spec.spread * torch.randn(spec.outputs, x.shape[2], generator=random)
    weights = [start.to(device, copy=True).requires_grad_() for _ in lrs]
    biases = [torch.zeros(spec.outputs, device=device, requires_grad=True) for _ in lrs]
    groups = [{"params": [w, b], "lr": lr} for w, b, lr in zip(weights, biases, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.passes * -(-len(chosen) // _BATCH))
    size = Size(labels.shape[1], labels.shape[2])
    rows = math.isqrt(x.shape[1] * size.height // size.width)
    grid = (rows, x.shape[1] // rows)
    order = torch.Generator().manual_seed(spec.seed)
    with meter(f"{spec.name} head", spec.passes, "passes") as m:
        for _ in range(spec.passes):
            for rows in chosen[torch.randperm(len(chosen), generator=order)].split(_BATCH):
                # One layer for all heads is faster. Each head has its own loss, and so its own gradients.
                together = LinearHead(mean, std, torch.cat(weights), torch.cat(biases), grid)
                maps, target = together.maps(x[rows].to(device), size), labels[rows].to(device)
                optimizer.zero_grad()
                losses = [spec.loss(own, target) for own in maps.split(spec.outputs, dim=1)]
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
            m.advance(1)
    return [LinearHead(mean, std, w.detach(), b.detach(), grid) for w, b in zip(weights, biases, strict=True)]
