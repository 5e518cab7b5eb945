"""Give a trained student a classification head, so that it can be fine-tuned with labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import FinetuneConfig
from pipeline.models.backbone import Backbone
from pipeline.models.loading import create_model
from pipeline.models.names import CONFIG, HF, LOCAL, OWN
from pipeline.storage.json_files import read_json
from singer.errors import UserError


def student_with_head(folder: Path, settings: FinetuneConfig, classes: int, names: Sequence[str] = ()) -> Backbone:
    """Load the student in `folder`, with a new head of zeros; all of it can be trained.

    names: of the classes, by label. A head that the student has is replaced. Raises UserError if its architecture has
    no linear head, or if it cannot be built for finetune.image_size.
    """
    architecture = str(read_json(folder, CONFIG, "model folder").get("architecture"))
    if architecture.startswith((HF, OWN)):
        raise UserError(
            f"{folder} is a {architecture}, and finetune gives heads to models of timm only; train a head on the "
            "vectors of singer embed, or fine-tune the student in your own program"
        )
    args = {"drop_path_rate": settings.drop_path}
    student = create_model(f"{LOCAL}{folder}", settings.image_size, args, None, pretrained=True, what="model")
    student.model.reset_classifier(classes)
    if names:
        student.model.pretrained_cfg["label_names"] = list(names)
    set_head(student, torch.zeros_like(_linear(student).weight), torch.zeros(classes))
    return replace(student, model_args={**student.model_args, "num_classes": classes})


def set_head(student: Backbone, weight: Tensor, bias: Tensor) -> None:
    """Set the weights of the head: (classes, width) and (classes,)."""
    head = _linear(student)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(bias)


def _linear(student: Backbone) -> nn.Linear:
    head: Any = student.model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f"a {type(student.model).__name__} has no linear head, which fine-tuning needs")
    return head
