"""Domain shift: a linear head is trained on --train and tested, without changes, on --test.

The labels of --test may be other numbers. evaluate.class_map then gives the training class of each test label, such as
the 200 classes of ImageNet-R among the 1000 of ImageNet, and only these classes compete. The test shards select
nothing, as in classification.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config import EvaluateConfig
from pipeline.data import Images, check_class_numbers, require_labels
from pipeline.evaluation.classification import Accuracies, accuracy, check_choice, linear_scores
from pipeline.evaluation.context import EvaluateResult, EvaluationContext, first_and_normed
from pipeline.evaluation.global_features import global_features
from pipeline.runtime.progress import say
from singer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DomainShift(EvaluateResult):
    """Accuracies (%) on --test; a model without CLS has only mean_patch.

    classes: how many compete; normed: the same figures, measured on normed tokens.
    """

    classes: int
    linear: Accuracies
    normed: dict[str, Accuracies] | None


def probe(context: EvaluationContext) -> DomainShift:
    """Train a linear head on --train and return its accuracies on --test."""
    settings = context.settings
    rivals, right = compete(class_map(context.train, context.test, settings), context.test)
    seen = len(np.unique(context.test.labels))
    if settings.class_map is None and seen < len(rivals):
        say(
            f"note: --test has images of {seen} of {len(rivals)} classes, and all of them compete; with "
            "evaluate.class_map only those that it names do"
        )

    train_labels = torch.from_numpy(context.train.labels)
    train_features = global_features(context, context.train)
    test_features = global_features(context, context.test)

    def linear(train: dict[str, torch.Tensor], test: dict[str, torch.Tensor]) -> dict[str, Accuracies]:
        figures = {}
        for name, x in train.items():
            classes = int(train_labels.max()) + 1
            scores = linear_scores(x, train_labels, test[name], classes, settings, context.device)
            figures[name] = accuracy((block[:, rivals] for block in scores), right)
        return {"linear": figures}

    first, normed = first_and_normed({k: linear(train_features[k], test_features[k]) for k in train_features})
    return context.result(DomainShift, len(context.train), classes=len(rivals), **first, normed=normed)


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Raise UserError if images have no labels or are too few, or if the other set or the class map lacks a label."""
    require_labels(train, "--train")
    check_class_numbers(train)
    require_labels(test, "--test")
    check_choice(train.labels, settings)
    _check_labels(train, test, class_map(train, test, settings), settings.class_map)


def class_map(train: Images, test: Images, settings: EvaluateConfig) -> dict[int, int]:
    """Return {test label: train label}; without evaluate.class_map, the labels of both sets are the same."""
    if settings.class_map is None:
        return {int(label): int(label) for label in np.unique(train.labels)}
    return read_class_map(settings.class_map, test)


def compete(mapped: dict[int, int], test: Images) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the classes (k,) of the map, which compete, and the index of the right one for each test image (n,)."""
    rivals = sorted(set(mapped.values()))
    place = {label: i for i, label in enumerate(rivals)}
    return torch.tensor(rivals), torch.tensor([place[mapped[int(label)]] for label in test.labels])


def read_class_map(file: Path, test: Images, key: str = "evaluate.class_map", option: str = "--test") -> dict[int, int]:
    """Return {label: class} from a JSON object, or from a JSON list by position. key, option: for messages.

    Raises UserError, with the file's name, if it is neither, or if it lacks a label of the images.
    """
    form = f'{key}: {file} must be JSON such as {{"0": 6, "1": 42}} or a list of classes such as [6, 42]'
    try:
        tree = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{key}: {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(form) from None
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    mapped = {}
    for label, right in pairs:
        # isinstance would accept a bool as an int.
        if not str(label).isdecimal() or type(right) is not int or right < 0:
            raise UserError(f"{form}; found {label!r}: {right!r}")
        mapped[int(label)] = right
    if not mapped:
        raise UserError(form)
    missing = sorted(set(test.labels.tolist()) - set(mapped))
    if missing:
        raise UserError(f"{key}: {file} has no entry for label {missing[0]} of {option}; add it")
    return mapped


def _check_labels(train: Images, test: Images, mapped: dict[int, int], file: Path | None) -> None:
    unknown = sorted(set(test.labels.tolist()) - set(mapped))
    if unknown:
        raise UserError(
            f"--test has label {unknown[0]}, of which --train has no images; if it numbers classes differently, give "
            "evaluate.class_map"
        )
    absent = sorted(set(mapped.values()) - set(train.labels.tolist()))
    if absent:
        raise UserError(f"evaluate.class_map: {file} names label {absent[0]}, of which --train has no images")
