"""Retrieval without training: every test image looks for the others of its class, on CLS and on the mean patch.

Shards with NAME.cls beside NAME.jpg; --train plays no part.
"""

from dataclasses import dataclass

import torch

from pipeline.config import EvaluateConfig
from pipeline.probes.classification import features
from pipeline.probes.trial import EvaluateResult, Trial
from pipeline.shards import Images, require_labels
from singer.probes import retrieval_figures


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvaluateResult):
    """queries: test images whose class has others. Figures of each feature in percent: map, recall1, recall5."""

    queries: int
    retrieval: dict[str, dict[str, float]]


def probe(trial: Trial) -> Retrieval:
    """Raises ValueError as `check`."""
    check(None, trial.test, trial.settings)
    labels = torch.from_numpy(trial.test.labels)
    counts = labels.unique(return_counts=True)[1]
    found = features(trial.vit, trial.test, trial.settings, trial.device)
    return Retrieval(
        model=trial.model,
        train_images=0,
        test_images=len(trial.test),
        seconds=trial.seconds,
        written=trial.file,
        queries=int(counts[counts > 1].sum()),
        retrieval={name: retrieval_figures(x, labels) for name, x in found.items()},
    )


def check(train: Images | None, test: Images, settings: EvaluateConfig) -> None:
    """Raise ValueError for images without labels, and if no class has two images."""
    require_labels(test, "--test")
    if int(torch.from_numpy(test.labels).unique(return_counts=True)[1].max()) < 2:
        raise ValueError("--test: no class has two images, so that there is nothing to retrieve; give more images")
