"""The input and the result of every task of `singer evaluate`, and the kinds of tokens that are probed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.models.backbone import Backbone
from singer.backbones import final_norm
from singer.errors import UserError

T = TypeVar("T")
R = TypeVar("R", bound="EvaluateResult")
Answer = Literal["yes", "no", "unknown"]


# {kind of tokens: {"cls": (n, d), "mean_patch": (n, d)}} on the CPU; a model without CLS has only mean_patch.
Features = dict[str, dict[str, Tensor]]
# The key is the paths of the shards and a hash of which members of them are the images.
ComputedFeatures = dict[tuple[tuple[Path, ...], str], Features]


@dataclass(frozen=True)
class EvaluationContext:
    """A frozen model, the images that a task learns from and the images that it is tested on.

    model: the name or path that the user gave; backbone: the model itself, on `device`; learn_from: the images of
    --train, if given; started: time.perf_counter() at the start of the task; file: where the figures will be stored, or
    None; computed: features that the tasks of one command share; learned_from_test: as in EvaluateResult.
    """

    model: Path | str
    backbone: Backbone
    device: torch.device
    learn_from: Images | None
    test: Images
    settings: EvaluateConfig
    started: float
    file: Path | None
    computed: ComputedFeatures = field(default_factory=dict)
    learned_from_test: Answer | None = None

    @cached_property
    def kinds(self) -> dict[str, nn.Module]:
        """Return {kind of tokens that is probed: module that makes it from raw tokens}, as kinds_of does."""
        return kinds_of(self.backbone, self.settings)

    @property
    def train(self) -> Images:
        """Return the images of --train, for a task that learns."""
        assert self.learn_from is not None, "Task.check"
        return self.learn_from

    def result(self, kind: type[R], train_images: int, /, **figures: Any) -> R:
        """Return the result of a task that has learned from so many images, at its end. figures: fields of its own."""
        return kind(
            model=self.model,
            learned_from_test=self.learned_from_test,
            train=[path.name for path in self.learn_from.paths] if self.learn_from else [],
            test=[path.name for path in self.test.paths],
            train_images=train_images,
            test_images=len(self.test),
            seconds=time.perf_counter() - self.started,
            written=self.file,
            **figures,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The fields that the results of all tasks share; each task adds its figures.

    train, test: names of shards; learned_from_test: whether the student was trained on images of --test, or None for
    a model that is not a run.
    """

    model: Path | str
    learned_from_test: Answer | None
    train: list[str]
    test: list[str]
    train_images: int
    test_images: int
    seconds: float
    written: Path | None


def kinds_of(backbone: Backbone, settings: EvaluateConfig) -> dict[str, nn.Module]:
    """Return {kind of tokens: module that makes it from raw tokens}, as evaluate.tokens chooses.

    For `both`, `block` is first; `norm` follows if the model has a final norm. Raises UserError if only `norm` is
    asked for and the model has none.
    """
    norm = final_norm(backbone.model)
    if settings.tokens == "norm" and norm is None:
        raise UserError("evaluate.tokens norm is for ViTs with a final norm; use block for other models")
    kinds: dict[str, nn.Module] = {}
    if settings.tokens != "norm":
        kinds["block"] = nn.Identity()
    if settings.tokens != "block" and norm is not None:
        kinds["norm"] = norm
    return kinds


def first_and_normed(figures: Mapping[str, T]) -> tuple[T, T | None]:
    """Split {kind: its figures} into the main figures of a result and its figures on normed tokens.

    The second is None if there is only one kind.
    """
    first, *others = figures.values()
    return first, others[0] if others else None
