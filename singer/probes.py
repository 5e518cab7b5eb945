"""Training-free probes of frozen features, and the figures of probes."""

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Class scores (m, classes) by weighted k-NN on cosine similarity (Wu et al. 2018; DINO's protocol).

    train (n, d) with labels (n,); test (m, d). A neighbour of similarity s votes exp(s / temperature).
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    scores = []
    for chunk in test.split(1024):
        similarity, nearest = (chunk @ train.T).topk(min(neighbours, len(train)), dim=1)
        votes = similarity.new_zeros(len(chunk), classes).scatter_add_(
            1, labels[nearest], (similarity / temperature).exp()
        )
        scores.append(votes)
    return torch.cat(scores)


def topk_percent(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share (%) of rows of scores (m, classes) whose label is among the k highest."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100.0 * float((best == labels[:, None]).any(1).float().mean())


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) of elements by label (row) and prediction (column).

    predicted, labels: integers of one shape; elements with a negative label are left out.
    """
    seen = labels >= 0
    pairs = labels[seen].long() * classes + predicted[seen]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union (classes,) of a confusion matrix; NaN for classes that neither side has."""
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both)
