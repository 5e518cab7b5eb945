"""The model's own classification head, such as a teacher's: the task learns nothing and does not read --train.

Labels are numbers of the head's classes, or evaluate.class_map gives the class of each label; then only the mapped
classes compete, as in domain_shift.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig
from pipeline.data import Images, require_labels
from pipeline.evaluation.classification import accuracy
from pipeline.evaluation.context import EvaluateResult, EvaluationContext
from pipeline.evaluation.domain_shift import compete, read_class_map
from pipeline.evaluation.model_inputs import compute_head
from singer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OwnHead(EvaluateResult):
    """Accuracies (%) with the 95 % confidence interval of top1. classes: how many compete."""

    top1: float
    top5: float
    top1_low: float
    top1_high: float
    classes: int


def probe(context: EvaluationContext) -> OwnHead:
    """Return the accuracy of the model's own head on --test.

    Raises UserError if the model has no head, or if the head has no class for a label.
    """
    check(context.learn_from, context.test, context.settings)
    model, settings = context.backbone.model, context.settings
    mapped = class_of_label(model, str(context.model), context.test, settings.class_map, Asked())
    rivals, right = compete(mapped, context.test)
    batches = compute_head(context.backbone, context.test, settings, context.device, settings.crop)
    figures = accuracy((logits[:, rivals] for logits in batches), right)
    return context.result(OwnHead, 0, classes=len(rivals), **figures)


def check(train: Images | None, test: Images, settings: EvaluateConfig) -> None:
    """Raise UserError if images have no labels, or if the class map cannot be used."""
    require_labels(test, "--test")
    if settings.class_map is not None:
        read_class_map(settings.class_map, test)


@dataclass(frozen=True)
class Asked:
    """What asks for the classes of a head, for messages.

    setting: the option or key that does; images: the option with the images; class_map: the key with a class map;
    remedy: what to do without a head; whole: whether the head must have as many classes as the images, unless their
    names or a class map say which.
    """

    setting: str = "--task head"
    images: str = "--test"
    class_map: str = "evaluate.class_map"
    remedy: str = "take a task that trains one"
    whole: bool = False


def class_of_label(model: Any, who: str, images: Images, class_map: Path | None, asked: Asked) -> dict[int, int]:
    """Return the class of a model's head for each label: by a class map, by its name, or else of the same number.

    who: the model, for messages. Raises UserError if the model has no head, or if the head has no class for a label.
    """
    count = int(model.num_classes)
    if not count:
        raise UserError(f"{asked.setting}: {who} has no classification head; {asked.remedy}")
    if class_map is not None:
        mapped = read_class_map(class_map, images, asked.class_map, asked.images)
        if max(mapped.values()) >= count:
            raise UserError(
                f"{asked.class_map}: {class_map} names class {max(mapped.values())}, but the head has 0 to {count - 1}"
            )
        return mapped
    by_name = _by_name(model, who, images, asked)
    if by_name:
        return by_name
    named, most = named_classes(images), int(images.labels.max())
    if named is None and asked.whole:
        named = most + 1
    if named is not None and named != count:
        found = _counted(named)
    elif most >= count:
        found = f"label {most}"
    else:
        return {label: label for label in range(count)}
    raise UserError(
        f"{asked.setting}: {asked.images} has {found}, but the head of {who} has {_counted(count)}; if the images "
        f"number their classes differently, give {asked.class_map}"
    )


def _by_name(model: Any, who: str, images: Images, asked: Asked) -> dict[int, int]:
    """Return {label: class of the head with the same name}; {} if the names of one are not known, or none is in both.

    Raises UserError if only some of the classes are in both, or none, of another number of classes.
    """
    ours = getattr(model, "pretrained_cfg", {}).get("label_names") or ()
    theirs, place = images.classes, {name: number for number, name in enumerate(ours)}
    labels = [label for label in np.unique(images.labels).tolist() if label < len(theirs)]
    found = {label: place[theirs[label]] for label in labels if theirs[label] in place}
    lacking = [theirs[label] for label in labels if label not in found]
    if ours and lacking and (found or len(theirs) != len(ours)):
        raise UserError(
            f"{asked.setting}: {asked.images} has class {lacking[0]!r}, which the head of {who} does not know; leave "
            f"it out, or give {asked.class_map}"
        )
    return found


def _counted(classes: int) -> str:
    return f"{classes} class{'' if classes == 1 else 'es'}"


def named_classes(images: Images) -> int | None:
    """Return how many classes have names, or None if no names are known."""
    return len(images.classes) or None
