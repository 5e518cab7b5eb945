"""The tasks of `singer evaluate`: a new one is a file here and a registry line."""

from pipeline.probes import classification, depth, domain_shift, head, retrieval, segmentation
from pipeline.probes.trial import Task

TASKS: dict[str, Task] = {
    "classification": Task(classification.probe, classification.check),
    "segmentation": Task(segmentation.probe, segmentation.check),
    "depth": Task(depth.probe, depth.check),
    "retrieval": Task(retrieval.probe, retrieval.check),
    "domain-shift": Task(domain_shift.probe, domain_shift.check),
    "head": Task(head.probe, head.check),
}
