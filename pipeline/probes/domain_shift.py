"""Domain shift: a linear head trained on --train and tested, as it is, on --test, whose labels may be other numbers.

evaluate.class_map says which training class a test label is, such as ImageNet-R's 200 of ImageNet's 1000; then only
these classes compete. Nothing is selected on the test shards: see classification.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.config import EvaluateConfig
from pipeline.probes.classification import (
    Accuracies,
    accuracy,
    check_classes,
    features,
    linear_scores,
    require_classes,
)
from pipeline.probes.trial import EvaluateResult, Trial
from pipeline.shards import Images, require_labels


@dataclass(frozen=True, kw_only=True)
class DomainShift(EvaluateResult):
    """Accuracies (%) on --test; a model without CLS has only mean_patch. classes: how many compete."""

    linear: Accuracies
    classes: int


def probe(trial: Trial) -> DomainShift:
    """Raises ValueError as `check`."""
    settings = trial.settings
    check(trial.train, trial.test, settings)
    mapped = class_map(trial.train, settings)
    rivals = torch.tensor(sorted(set(mapped.values())))
    place = {label: i for i, label in enumerate(rivals.tolist())}
    right = torch.tensor([place[mapped[int(label)]] for label in trial.test.labels])

    train_labels = torch.from_numpy(trial.train.labels)
    train_features = features(trial.vit, trial.train, settings, trial.device)
    test_features = features(trial.vit, trial.test, settings, trial.device)
    linear: Accuracies = {}
    for name, x in train_features.items():
        scores = linear_scores(x, train_labels, test_features[name], int(train_labels.max()) + 1, settings)
        linear[name] = accuracy(scores[:, rivals], right)
    return DomainShift(
        model=trial.model,
        train_images=len(trial.train),
        test_images=len(trial.test),
        seconds=trial.seconds,
        written=trial.file,
        linear=linear,
        classes=len(rivals),
    )


def check(train: Images, test: Images, settings: EvaluateConfig) -> None:
    """Raise ValueError for images without labels, and for labels that the other side or the class map lacks."""
    require_labels(train, "--train")
    require_labels(test, "--test")
    require_classes(train.labels)
    if settings.class_map is None:
        check_classes(train, test)
    _check_labels(train, test, class_map(train, settings), settings.class_map)


def class_map(train: Images, settings: EvaluateConfig) -> dict[int, int]:
    """{test label: train label}; without a map labels are the same on both sides."""
    if settings.class_map is None:
        return {int(label): int(label) for label in np.unique(train.labels)}
    return read_class_map(settings.class_map)


def read_class_map(file: Path) -> dict[int, int]:
    """{test label: train label} of a JSON object, or of a list by position. Raises ValueError naming the file."""
    form = (
        f'evaluate.class_map: {file} must be JSON such as {{"0": 6, "1": 42}} or a list of train labels such as [6, 42]'
    )
    try:
        tree = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"evaluate.class_map: {file}: {error.strerror}") from None
    except ValueError:
        raise ValueError(form) from None
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    mapped = {}
    for test, train in pairs:
        # A bool is an int to Python.
        if not str(test).isdecimal() or type(train) is not int or train < 0:
            raise ValueError(f"{form}; found {test!r}: {train!r}")
        mapped[int(test)] = train
    if not mapped:
        raise ValueError(form)
    return mapped


def _check_labels(train: Images, test: Images, mapped: dict[int, int], file: Path | None) -> None:
    unknown = sorted(set(test.labels.tolist()) - set(mapped))
    if unknown and file is None:
        raise ValueError(
            f"--test has label {unknown[0]}, of which --train has no images; if it numbers classes differently, give "
            "evaluate.class_map"
        )
    if unknown:
        raise ValueError(f"evaluate.class_map: {file} has no entry for label {unknown[0]} of --test; add it")
    absent = sorted(set(mapped.values()) - set(train.labels.tolist()))
    if absent:
        raise ValueError(f"evaluate.class_map: {file} names label {absent[0]}, of which --train has no images")
