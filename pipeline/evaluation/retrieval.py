"""Retrieval without training: every test image looks for the others of its class, on CLS and on the mean patch.

The shards hold NAME.cls beside NAME.jpg. The task does not read --train.
"""

from dataclasses import dataclass

import torch

from pipeline.config import EvaluateConfig
from pipeline.data import Images, require_labels
from pipeline.evaluation.context import EvaluateResult, EvaluationContext, first_and_normed
from pipeline.evaluation.global_features import global_features
from singer.errors import UserError
from singer.metrics import retrieval_figures


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvaluateResult):
    """Figures (%) of each feature: map, recall1 and recall5.

    queries: test images that share their class with another; normed: the same figures, measured on normed tokens.
    """

    queries: int
    retrieval: dict[str, dict[str, float]]
    normed: dict[str, dict[str, dict[str, float]]] | None


def probe(context: EvaluationContext) -> Retrieval:
    """Return how well each test image retrieves the others of its class."""
    labels = torch.from_numpy(context.test.labels)
    counts = labels.unique(return_counts=True)[1]
    found = global_features(context, context.test)
    first, normed = first_and_normed(
        {
            kind: {name: retrieval_figures(x, labels, context.device) for name, x in named.items()}
            for kind, named in found.items()
        }
    )
    return context.result(
        Retrieval,
        0,
        queries=int(counts[counts > 1].sum()),
        retrieval=first,
        normed=None if normed is None else {"retrieval": normed},
    )


def check(train: Images | None, test: Images, settings: EvaluateConfig) -> None:
    """Raise UserError if images have no labels, or if no class has two images."""
    require_labels(test, "--test")
    if int(torch.from_numpy(test.labels).unique(return_counts=True)[1].max()) < 2:
        raise UserError("--test: no class has two images, so there is nothing to retrieve; give more images")
