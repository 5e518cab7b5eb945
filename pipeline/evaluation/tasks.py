"""The tasks of `singer evaluate`: a new task is a file in this folder and a line in this registry."""

from pipeline.evaluation import classification, depth, domain_shift, own_head, retrieval, segmentation
from pipeline.evaluation.context import Task

TASKS: dict[str, Task] = {
    "classification": Task(classification.probe, classification.check),
    "segmentation": Task(segmentation.probe, segmentation.check),
    "depth": Task(depth.probe, depth.check),
    "retrieval": Task(retrieval.probe, retrieval.check, learns=False),
    "domain-shift": Task(domain_shift.probe, domain_shift.check),
    "head": Task(own_head.probe, own_head.check, learns=False),
}
