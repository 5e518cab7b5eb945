"""Training-free probes of frozen features."""

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
