"""The tasks of `singer evaluate`: a new one is a file here and a registry line."""

from pipeline.probes import classification, depth, domain_shift, head, retrieval, segmentation
from pipeline.probes.trial import Task

TASKS: dict[str, Task] = {
    "classification": classification.probe,
    "segmentation": segmentation.probe,
    "depth": depth.probe,
    "retrieval": retrieval.probe,
    "domain-shift": domain_shift.probe,
    "head": head.probe,
}
