"""How well a teacher's features fit labels, without training: scores that choose a teacher.

That is what DistillNearest and DistillWeighted do (arXiv 2304.12314). PARC is of Bolya et al. (2111.06977): it asks
whether images that differ in their features differ in their labels. CKA is the linear one of Kornblith et al.
(1905.00414).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def parc(features: Tensor, labels: Tensor) -> float:
    """Return the rank correlation, -1 to 1, of the images' distances in features (n, d) and in labels (n,).

    Distances are 1 - Pearson correlation, of features and of one-hot labels, of which there are two: those of images of
    the same class and of others. Each pair of images counts once. 0 if all distances are equal.
    """
    rows, columns = torch.tril_indices(len(labels), len(labels), -1)
    distances = 1 - torch.corrcoef(features.double())[rows, columns]
    ranks = torch.stack([_ranks(distances), _ranks((labels[rows] != labels[columns]).double())])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num())


def cka(a: Tensor, b: Tensor) -> float:
    """Return the linear CKA, 0 to 1, of two representations (n, d) and (n, e) of the same images."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    # Of the Grams (n, n), which are smaller than covariances where features are wide.
    ours, theirs = a @ a.T, b @ b.T
    return float((ours * theirs).sum() / (ours.norm() * theirs.norm()))


def teacher_weights(scores: Sequence[float]) -> list[float]:
    """Return weights that add up to 1, in proportion to the squares of scores above 0 (DistillWeighted, power 2).

    Equal weights if no score is above 0.
    """
    squares = [max(0.0, score) ** 2 for score in scores]
    total = sum(squares)
    return [square / total if total else 1 / len(squares) for square in squares]


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values (n,); equal ones share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ends = count.cumsum(0).double()
    shared: Tensor = ends - (count - 1) / 2
    return shared[place]
