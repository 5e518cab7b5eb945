"""Linear and k-NN classification, on CLS and on the mean patch.

The shards hold NAME.cls beside NAME.jpg. The test shards select nothing: the linear probe's penalty is chosen on a
split of the training shards.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.data import Images, check_class_numbers, require_labels
from pipeline.evaluation.context import EvaluateResult, EvaluationContext, first_and_normed
from pipeline.evaluation.feature_rows import fits, moments
from pipeline.evaluation.global_features import global_features
from pipeline.runtime.progress import say
from singer.errors import UserError
from singer.logistic import Logistic, LogisticProblem, Streamed
from singer.metrics import knn_scores, shot_groups, topk_hits, wilson_percent

_FIT_SHARE = 0.8
# The fits among which the penalty is chosen have converged when another step would lower the loss by less than this
# share of it. They agree with closer fits within the noise of the held-out accuracy.
_TOL_OF_CHOICE = 1e-4
# So many rows of features are read at once.
_BLOCK = 1 << 14

# {"cls": {"top1": .., "top5": .., "top1_low": .., "top1_high": ..}, "mean_patch": {..}}, in percent. low and high bound
# the 95 % confidence interval of top1. Where classes differ in the number of their training images, there are also
# top1_many, top1_medium and top1_few.
Accuracies = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Classification(EvaluateResult):
    """Accuracies (%) of both probes.

    A model without CLS has only mean_patch. normed: the same figures, measured on normed tokens.
    """

    classes: int
    linear: Accuracies
    knn: Accuracies
    normed: dict[str, Accuracies] | None


def probe(context: EvaluationContext) -> Classification:
    """Return the accuracies of a linear and of a k-NN classifier on frozen features."""
    settings = context.settings
    train_features = global_features(context, context.train)
    test_features = global_features(context, context.test)
    train_labels, test_labels = (torch.from_numpy(images.labels) for images in (context.train, context.test))
    classes = int(train_labels.max()) + 1
    if len(train_labels) < settings.neighbours:
        say(f"k-NN: --train has {len(train_labels)} images, so all vote (evaluate.neighbours={settings.neighbours})")
    groups = _shots(train_labels, test_labels, classes, settings)

    def figures(train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, Accuracies]:
        linear: Accuracies = {}
        knn: Accuracies = {}
        for name, x in train.items():
            scores = linear_scores(x, train_labels, test[name], classes, settings, context.device)
            linear[name] = accuracy(scores, test_labels, groups)
            k, temperature = settings.neighbours, settings.temperature
            scores = knn_scores(x, train_labels, test[name], classes, k, temperature, context.device)
            knn[name] = accuracy(scores, test_labels, groups)
        return {"linear": linear, "knn": knn}

    first, normed = first_and_normed({k: figures(train_features[k], test_features[k]) for k in train_features})
    return context.result(Classification, len(context.train), classes=classes, **first, normed=normed)


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Raise UserError if images have no labels, if --train lacks a label of --test, or if it has too few images."""
    check_labels(train, test, int(train.labels.max()) + 1)
    check_choice(train.labels, settings)


def check_labels(train: Images, test: Images, classes: int) -> None:
    """Raise UserError as `check` does, for a classifier of so many classes."""
    require_labels(train, "--train")
    check_class_numbers(train)
    require_labels(test, "--test")
    require_classes(train.labels)
    most = int(test.labels.max())
    if most >= classes:
        if most < len(test.classes):
            raise UserError(f"--test has class {test.classes[most]!r}, of which --train has no image")
        raise UserError(f"--test has label {most}, but --train has only 0 to {classes - 1}")


def require_classes(labels: np.ndarray) -> None:
    """Raise UserError if the labels (n,) hold one class only."""
    if len(np.unique(labels)) < 2:
        raise UserError("--train has images of one class only; a classifier needs two")


def linear_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    settings: EvaluateConfig,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Yield the class scores (B, classes) of a logistic regression on standardised features, in blocks on the CPU.

    train: features (n, d) with labels (n,); test: features (m, d). The penalty is the one of settings.strengths that
    is best on a held-out fifth of the training images. The regression then learns from all training images. device:
    where it learns; default: where the features are. A fit that has not converged is told.
    """
    probe, known, (mean, std) = fit_linear(train, labels, settings, device)
    for block in test.split(_BLOCK):
        # A class that no training image has gets the lowest score.
        scores = torch.full((len(block), classes), -torch.inf)
        scores[:, known] = probe.scores((block.to(mean.device) - mean) / std).cpu()
        yield scores


def fit_linear(
    train: Tensor, labels: Tensor, settings: EvaluateConfig, device: torch.device | None
) -> tuple[Logistic, Tensor, tuple[Tensor, Tensor]]:
    """Fit the regression of linear_scores: return it, the classes that it knows (k,), and mean and std of the features.

    It scores standardised features, on the device.
    """
    require_classes(labels.numpy())
    known, numbers = labels.unique(return_inverse=True)
    device = train.device if device is None else device
    strengths, start = sorted(settings.strengths), None
    if len(strengths) > 1:
        fit, held_out = (torch.from_numpy(rows) for rows in _split(labels.numpy(), settings))
        x, scale = _standardised(train, fit, device)
        problem, fitted = LogisticProblem(x, numbers[fit].to(device), len(known)), list[Logistic]()
        for strength in strengths:  # each starts from the last
            fitted.append(problem.fit(strength, fitted[-1] if fitted else None, tol=_TOL_OF_CHOICE))
        _tell(fitted, f"of {len(x)} images, to choose among evaluate.strengths")
        x, _ = _standardised(train, held_out, device, scale)
        right = [_accuracy(probe, x, numbers[held_out].to(device)) for probe in fitted]
        best = right.index(max(right))
        strengths, start = [strengths[best]], fitted[best]
        del x, problem
    x, scale = _standardised(train, torch.arange(len(train)), device)
    probe = LogisticProblem(x, numbers.to(device), len(known)).fit(strengths[0], start)
    _tell([probe], f"of {len(x)} images")
    return probe, known, scale


def _tell(probes: Iterable[Logistic], which: str) -> None:
    """Say which fits have not converged."""
    for probe in probes:
        if not probe.converged:
            say(f"note: the linear probe {which} has not converged in {probe.passes} passes")


def _accuracy(probe: Logistic, x: Tensor | Streamed, labels: Tensor) -> float:
    """Return the share of features whose label has the highest score."""
    blocks = zip(x.split(_BLOCK), labels.split(_BLOCK), strict=True)
    return sum(int((probe.scores(part).argmax(1) == own).sum()) for part, own in blocks) / len(labels)


def _standardised(
    x: Tensor, rows: Tensor, device: torch.device, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor | Streamed, tuple[Tensor, Tensor]]:
    """Return some rows of features (n, d) standardised on a device, and their mean and std.

    Features that the device has no room for are streamed. known: mean and std, if they are.
    """
    mean, std = (t.to(device) for t in _moments(x, rows)) if known is None else known
    if fits(2 * len(rows) * x.shape[1], device):
        return x[rows].to(device).sub_(mean).div_(std), (mean, std)
    return Streamed(x, rows, mean, std), (mean, std)


def _moments(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the std (d,) of some rows of features; the std of a channel that does not vary is 1."""
    mean, std = moments(x[part] for part in rows.split(_BLOCK))
    return mean.float(), torch.where(std > 1e-7 * mean.abs(), std, 1.0).float()


def check_choice(labels: np.ndarray, settings: EvaluateConfig) -> None:
    """Raise UserError if no probe can learn from these labels (n,), before any features are computed."""
    if len(settings.strengths) > 1:
        _split(labels, settings)
    else:
        require_classes(labels)


def _split(y: np.ndarray, settings: EvaluateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Divide images with labels y (n,): numbers of those to learn from, and of a fifth that is held out.

    Raises UserError if those to learn from are of one class, which happens if there are few.
    """
    require_classes(y)
    fit, held_out = train_test_split(np.arange(len(y)), train_size=_FIT_SHARE, random_state=settings.seed)
    if len(np.unique(y[fit])) < 2:
        one = f"--set 'evaluate.strengths=[{settings.strengths[0]}]'"
        raise UserError(
            f"--train has {len(y)} images: with a fifth held out to choose among evaluate.strengths, all others are of "
            f"one class; give more images, or one strength: {one}"
        )
    return np.sort(fit), np.sort(held_out)


def _shots(train: Tensor, test: Tensor, classes: int, settings: EvaluateConfig) -> dict[str, Tensor]:
    """Return {group: mask (m,)} of the test images, by the number of training images that their class has.

    Empty groups are left out. The result is {} if evaluate.shots is none, or if all images are in one group: its
    figure would be the figure of all images.
    """
    if settings.shots is None:
        return {}
    masks = shot_groups(torch.bincount(train, minlength=classes), settings.shots)
    groups = {name: mask[test] for name, mask in masks.items() if mask[test].any()}
    return groups if len(groups) > 1 else {}


def accuracy(scores: Iterable[Tensor], labels: Tensor, groups: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Return the figures (%) of scores against labels (m,), as described at Accuracies.

    scores: blocks (B, classes) in the order of the labels, of which one at a time is held; groups: {name: mask (m,)};
    each group adds a figure top1_NAME.
    """
    hits, done = {k: torch.zeros(len(labels), dtype=torch.bool) for k in (1, 5)}, 0
    for block in scores:
        rows = slice(done, done + len(block))
        for k, hit in hits.items():
            hit[rows] = topk_hits(block, labels[rows].to(block.device), k).cpu()
        done += len(block)
    figures = {f"top{k}": _percent(hit) for k, hit in hits.items()}
    figures["top1_low"], figures["top1_high"] = wilson_percent(int(hits[1].sum()), len(labels))
    return figures | {f"top1_{name}": _percent(hits[1][rows]) for name, rows in (groups or {}).items()}


def _percent(hits: Tensor) -> float:
    return 100.0 * float(hits.float().mean())
