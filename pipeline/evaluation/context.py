"""What every task of `singer evaluate` is given, what it gives back, and the features of a frozen model."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.data import ImageFile, Images
from pipeline.data.prefetch import prefetch
from pipeline.data.views import View, apply_view, normalise
from pipeline.runtime.progress import meter
from pipeline.teachers.backbone import Backbone
from singer.backbones import block_outputs, depth, final_norm
from singer.errors import UserError

T = TypeVar("T")
Answer = Literal["yes", "no", "unknown"]
_FEW_CLASSES = 10


# {kind of tokens: {"cls": (n, d), "mean_patch": (n, d)}} on the CPU; a model without CLS has only mean_patch.
Features = dict[str, dict[str, Tensor]]
# By shards and what of them are the images.
ComputedFeatures = dict[tuple[tuple[Path, ...], str], Features]


@dataclass(frozen=True)
class EvaluationContext:
    """A frozen model, the images that a task learns from and those that it is tested on.

    model: what the user named; vit: the model itself, on `device`; learn_from: the images of --train, if given;
    started: time.perf_counter() at the start of the task; file: where the figures will be stored, if anywhere;
    computed: features that the tasks of one command share.
    """

    model: Path | str
    vit: Backbone
    device: torch.device
    learn_from: Images | None
    test: Images
    settings: EvaluateConfig
    started: float
    file: Path | None
    computed: ComputedFeatures = field(default_factory=dict)

    @cached_property
    def kinds(self) -> dict[str, nn.Module]:
        """The kinds of tokens that are probed, `block` or `norm`, and what makes them of raw ones; see kinds_of."""
        return kinds_of(self.vit, self.settings)

    @property
    def train(self) -> Images:
        """Raises UserError if there are none: only a task that learns asks for them."""
        if self.learn_from is None:
            raise UserError("this task learns from images; give --train")
        return self.learn_from

    @property
    def seconds(self) -> float:
        """Since the start of the task."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """What the results of all tasks have; each adds its figures. train, test: names of shards, which evaluate adds.

    learned_from_test: whether the student was trained on images of --test; None of a model that is no run. evaluate
    adds it, too.
    """

    model: Path | str
    learned_from_test: Answer | None = field(default=None, init=False)
    train: list[str] = field(default_factory=list, init=False)
    test: list[str] = field(default_factory=list, init=False)
    train_images: int
    test_images: int
    seconds: float
    written: Path | None


def without_top5(figures: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is shown: of few classes, almost any is among the first five."""
    if (figures.get("classes") or 0) > _FEW_CLASSES:
        return dict(figures)

    def part(value: Any) -> Any:
        return {k: part(v) for k, v in value.items() if k != "top5"} if isinstance(value, dict) else value

    return {name: part(value) for name, value in figures.items() if name != "top5"}


def kinds_of(vit: Backbone, settings: EvaluateConfig) -> dict[str, nn.Module]:
    """{kind: what makes it of raw tokens} of evaluate.tokens; of both, first `block`, and `norm` if there is one."""
    norm = final_norm(vit.model)
    if settings.tokens == "norm" and norm is None:
        raise UserError("evaluate.tokens norm is for ViTs with a final norm; of other models take block")
    kinds: dict[str, nn.Module] = {}
    if settings.tokens != "norm":
        kinds["block"] = nn.Identity()
    if settings.tokens != "block" and norm is not None:
        kinds["norm"] = norm
    return kinds


def first_and_normed(figures: Mapping[str, T]) -> tuple[T, T | None]:
    """Of {kind: its figures}, those at a result's top, and those of normed tokens if that is another kind."""
    first, *others = figures.values()
    return first, others[0] if others else None


@dataclass(frozen=True)
class Task:
    """probe: learns from the model's features and tests what it has learned. check: of (train, test, settings).

    Both raise UserError for what the user can mend; `check` knows before there is a model.
    """

    probe: Callable[[EvaluationContext], EvaluateResult]
    check: Callable[[Images, Images, EvaluateConfig], None]


def tokens(
    vit: Backbone, images: Images, settings: EvaluateConfig, device: torch.device, view: Callable[[Image.Image], View]
) -> Iterator[Tensor]:
    """All raw tokens (B, P + patches, d) of the last block, batch by batch, on the device and without gradients.

    view: the part of an image that the model sees.
    """
    last = depth(vit.model) - 1
    for batch in inputs(vit, images, settings, device, view):
        with torch.no_grad():
            x = block_outputs(vit.model, batch, [last])[last]
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
