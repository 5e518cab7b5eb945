"""The tasks of `singer evaluate`: a new task is a file in this folder and a line in this registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.evaluation import classification, depth, domain_shift, own_head, retrieval, segmentation
from pipeline.evaluation.context import EvaluateResult, EvaluationContext
from singer.errors import UserError


@dataclass(frozen=True)
class Task:
    """A task of `singer evaluate`.

    probe: tests the model's features; checks: looks at (train, test, settings) before the model is loaded. Both raise
    UserError for mistakes that the user can fix. learns: whether it needs --train.
    """

    probe: Callable[[EvaluationContext], EvaluateResult]
    checks: Callable[[Any, Images, EvaluateConfig], None]
    learns: bool = True

    def check(self, train: Images | None, test: Images, settings: EvaluateConfig) -> None:
        """Raise UserError if the task cannot be done with these images."""
        if self.learns and train is None:
            raise UserError("this task learns from images; give --train")
        self.checks(train, test, settings)


TASKS: dict[str, Task] = {
    "classification": Task(classification.probe, classification.check),
    "segmentation": Task(segmentation.probe, segmentation.check),
    "depth": Task(depth.probe, depth.check),
    "retrieval": Task(retrieval.probe, retrieval.check, learns=False),
    "domain-shift": Task(domain_shift.probe, domain_shift.check),
    "head": Task(own_head.probe, own_head.check, learns=False),
}
