"""Training-free probes of frozen features, and the figures of probes."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError

# The normal distribution has 95 % of its mass within this many standard deviations.
_Z95 = 1.959964
# Of so many rows each, two sets are compared at once.
_QUERIES, _GALLERY = 1 << 10, 1 << 14
# So many similarities are sorted at once, or one row of them if that is more.
_SIMILARITIES = 1 << 24


def knn_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    neighbours: int,
    temperature: float,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Yield class scores (B, classes) by weighted k-NN on cosine similarity (Wu et al. 2018; DINO's protocol).

    train (n, d) with labels (n,); test (m, d). A neighbour of similarity s votes exp((s - 1) / temperature). Classes
    without a vote have the score -inf. The neighbours are exact; one block of either set at a time is on the device,
    by default that of train.
    """
    device = train.device if device is None else device
    chunks = test.split(_QUERIES)
    # The similarities and labels of the nearest so far.
    best = [
        (torch.empty(len(chunk), 0, device=device), torch.empty(len(chunk), 0, dtype=labels.dtype, device=device))
        for chunk in chunks
    ]
    for part, own in zip(train.split(_GALLERY), labels.split(_GALLERY), strict=True):
        part, own = F.normalize(part.to(device), dim=1), own.to(device)
        for number, chunk in enumerate(chunks):
            similarity, nearest = (F.normalize(chunk.to(device), dim=1) @ part.T).topk(min(neighbours, len(part)))
            both = torch.cat([best[number][0], similarity], 1)
            similarity, order = both.topk(min(neighbours, both.shape[1]))
            best[number] = similarity, torch.cat([best[number][1], own[nearest]], 1).gather(1, order)
    for similarity, label in best:
        votes = similarity.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, label, ((similarity - 1) / temperature).exp())
        voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, label, True)
        yield votes.masked_fill(~voted, -torch.inf)


def knn_among(x: Tensor, labels: Tensor, groups: Tensor, neighbours: int, temperature: float) -> float | None:
    """Return how many of the labelled rows x (n, d) have the label (n,) that their neighbours vote for, in percent.

    Neighbours are rows of another group (n,), such as of another image, and vote as in knn_scores. Rows of label -1 are
    left out. None if the rest has fewer than two labels or groups.
    """
    known = labels >= 0
    x, labels, groups = F.normalize(x[known], dim=1), labels[known], groups[known]
    if len(labels.unique()) < 2 or len(groups.unique()) < 2:
        return None
    similarity = (x @ x.T).masked_fill_(groups[:, None] == groups, -torch.inf)
    best, nearest = similarity.topk(min(neighbours, len(x)))
    votes = x.new_zeros(len(x), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], ((best - 1) / temperature).exp())
    return 100 * float((votes.argmax(1) == labels).double().mean())


def topk_hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return which rows (m,) of scores (m, classes) have their label among the k highest scores.

    A score of -inf is none: such a class is never among them.
    """
    values, best = scores.topk(min(k, scores.shape[1]), dim=1)
    return ((best == labels[:, None]) & (values > -torch.inf)).any(1)


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count elements (classes, classes) by label (row) and prediction (column).

    predicted, labels: integers of one shape; elements with a negative label are left out.
    """
    seen = labels >= 0
    pairs = labels[seen].long() * classes + predicted[seen]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """Compute the intersection over union (classes,) of a confusion matrix; NaN for classes that neither side has."""
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both)


def wilson_percent(right: int, total: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval (%) of a share right / total, by Wilson's score (1927).

    Unlike the normal approximation it stays within 0 to 100 and is right near both ends.
    """
    share, z2 = right / total, _Z95**2
    middle = share + z2 / (2 * total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = ((middle + sign * half) / (1 + z2 / total) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def shot_groups(counts: Tensor, thresholds: tuple[int, int]) -> dict[str, Tensor]:
    """Return masks (classes,) of the classes with many, medium and few training images (Liu et al. 2019).

    counts: (classes,), training images of each class; thresholds (low, high): few is below low, many is above high.
    """
    low, high = thresholds
    return {"many": counts > high, "medium": (counts >= low) & (counts <= high), "few": counts < low}


def retrieval_figures(x: Tensor, labels: Tensor, device: torch.device | None = None) -> dict[str, float]:
    """Measure in percent how well each row of x (n, d) finds others of its label (n,) by cosine similarity.

    map: the mean over queries of average precision, taken over the full ranking; recall1, recall5: the share of queries
    with one of its label among the nearest 1 and 5. The query itself is not a candidate. A row that is alone with its
    label is not a query. A block of x at a time is on the device, by default that of x, with some rows of
    similarities. Raises UserError if there are no queries.
    """
    count, labels = len(x), labels.to(x.device if device is None else device)
    if len(labels.unique()) == count:
        raise UserError("no label occurs twice")
    ranks = torch.arange(1, count, device=labels.device)
    precisions, firsts = [], []
    for rows in torch.arange(count).split(max(1, min(_QUERIES, _SIMILARITIES // count))):
        queries = F.normalize(x[rows].to(labels.device), dim=1)
        similarity = torch.cat([queries @ F.normalize(g.to(labels.device), dim=1).T for g in x.split(_GALLERY)], 1)
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # the query itself comes last, and is cut off
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        hits = labels[order] == labels[rows, None]
        hits = hits[hits.any(1)]
        precisions.append((hits * (hits.cumsum(1) / ranks.double())).sum(1) / hits.sum(1))
        firsts.append(hits.int().argmax(1))
    precision, first = torch.cat(precisions), torch.cat(firsts)
    return {
        "map": 100 * float(precision.mean()),
        **{f"recall{k}": 100 * float((first < k).double().mean()) for k in (1, 5)},
    }


def expected_depth(logits: Tensor, low: float, high: float) -> Tensor:
    """Compute depth (B, h, w) in meters: the mean of bins from low to high, weighted by logits (B, bins, h, w).

    Bins are spread evenly. Weights are relu(logit) + 0.1, divided by their sum, as in the linear depth heads of DINOv2
    (Oquab et al. 2023) after AdaBins (Bhat et al. 2021).
    """
    weights = logits.relu() + 0.1
    bins = torch.linspace(low, high, logits.shape[1], device=logits.device, dtype=logits.dtype)
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), bins)


def silog_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Compute the scale-invariant logarithmic loss of depth (Eigen et al. 2014), in the form of AdaBins.

    It is the root of var(g) + 0.15 mean(g)^2 with g = log(predicted / true). predicted, true: one shape, meters,
    predicted above 0; where true is 0 it is missing and does not count. The loss is 0 if all are missing.
    """
    seen = true > 0
    count = seen.sum().clamp(min=1)
    g = torch.where(seen, predicted.log() - torch.where(seen, true, 1.0).log(), 0.0)
    # The gradient of a root is infinite at 0.
    return (g.square().sum() / count - 0.85 * (g.sum() / count).square()).clamp(min=1e-12).sqrt()


def l1_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Compute the mean absolute error of depth. predicted, true: one shape; where true is 0 it does not count."""
    seen = true > 0
    return torch.where(seen, (predicted - true).abs(), 0.0).sum() / seen.sum().clamp(min=1)


def depth_sums(predicted: Tensor, true: Tensor) -> Tensor:
    """Compute what depth_figures needs of some pixels; the sums of several images can be added.

    predicted, true: one shape, meters, predicted above 0; where true is 0 it is missing and does not count. Returns
    (4,) float64: pixels, and sums of squared errors, relative errors and errors below a factor of 1.25.
    """
    p, t = predicted[true > 0].double(), true[true > 0].double()
    within = torch.maximum(p / t, t / p) < 1.25
    return torch.stack([torch.ones_like(t).sum(), (p - t).square().sum(), ((p - t).abs() / t).sum(), within.sum()])


def depth_figures(sums: Tensor) -> dict[str, float]:
    """Compute RMSE (meters), AbsRel and delta1 (shares) over all pixels in the sums of depth_sums."""
    square, relative, within = (sums[1:] / sums[0]).tolist()
    return {"rmse": math.sqrt(square), "abs_rel": relative, "delta1": within}
