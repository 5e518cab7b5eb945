"""The arithmetic of probes against formulas by hand and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from conftest import seeded
from scipy.stats import binom
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from singer.errors import UserError
from singer.metrics import (
    depth_figures,
    depth_sums,
    expected_depth,
    l1_loss,
    retrieval_figures,
    shot_groups,
    silog_loss,
    wilson_percent,
)


def test_wilson_interval() -> None:
    # 15 of 20: (0.75 + z²/40 ± z sqrt(0.75 · 0.25 / 20 + z²/1600)) / (1 + z²/20) with z = 1.96
    assert wilson_percent(15, 20) == pytest.approx((53.1299, 88.8138), abs=1e-3)
    assert wilson_percent(0, 10) == pytest.approx((0.0, 27.7533), abs=1e-3)
    assert wilson_percent(10, 10) == pytest.approx((72.2467, 100.0), abs=1e-3)
    # Its ends are the shares whose score test just fails to reject what was seen.
    for end in wilson_percent(130, 400):
        p = end / 100
        assert abs(130 / 400 - p) / math.sqrt(p * (1 - p) / 400) == pytest.approx(1.959964, abs=1e-6)
    # It holds the true share in 95 % of all samples, but for the steps of a count.
    held = [k for k in range(201) if (interval := wilson_percent(k, 200))[0] <= 30 <= interval[1]]
    assert binom.pmf(held, 200, 0.3).sum() == pytest.approx(0.95, abs=0.01)


def test_shot_groups_have_their_bounds() -> None:
    groups = shot_groups(torch.tensor([0, 19, 20, 100, 101]), (20, 100))
    assert {name: mask.nonzero().flatten().tolist() for name, mask in groups.items()} == {
        "many": [4],
        "medium": [2, 3],
        "few": [0, 1],
    }


def test_retrieval_is_that_of_scikit_learn() -> None:
    """On 300 rows, more than are compared at once; the label 7 occurs once and asks nothing."""
    rng = np.random.default_rng(seeded(0))
    labels = np.append(rng.integers(0, 7, 299), 7)
    x = rng.normal(size=(8, 6))[labels] + rng.normal(size=(300, 6))
    figures = retrieval_figures(torch.from_numpy(x), torch.from_numpy(labels))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    precision = []
    for i in range(299):
        others = np.arange(300) != i
        precision.append(average_precision_score(labels[others] == labels[i], unit[others] @ unit[i]))
    assert figures["map"] == pytest.approx(100 * np.mean(precision), abs=1e-6)
    near = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x).kneighbors(x, return_distance=False)
    assert (near[:, 0] == np.arange(300)).all()
    for k in (1, 5):
        found = (labels[near[:299, 1 : k + 1]] == labels[:299, None]).any(1)
        assert figures[f"recall{k}"] == pytest.approx(100 * found.mean(), abs=1e-6)


def test_retrieval_at_its_ends() -> None:
    labels = torch.arange(4).repeat(100)
    perfect = retrieval_figures(torch.eye(4)[labels] + 0.01 * torch.randn(400, 4), labels)
    assert perfect == {"map": 100, "recall1": 100, "recall5": 100}
    chance = retrieval_figures(torch.randn(400, 4), labels[torch.randperm(400)])
    assert chance["map"] == pytest.approx(25, abs=3) and chance["recall1"] == pytest.approx(25, abs=8)
    assert chance["recall5"] == pytest.approx(100 * (1 - 0.75**5), abs=8)
    with pytest.raises(UserError, match="no label occurs twice"):
        retrieval_figures(torch.randn(3, 4), torch.arange(3))


def test_depth_figures() -> None:
    """By hand; missing pixels do not count, and images of any size are pooled by pixels."""
    true = torch.tensor([[1.0, 2.0, 0.0], [4.0, 5.0, 0.0]])
    assert depth_figures(depth_sums(true.clamp(min=1), true)) == {"rmse": 0, "abs_rel": 0, "delta1": 1}
    predicted = torch.tensor([[1.2, 2.0, 9.0], [3.0, 6.25, 9.0]])
    other = depth_sums(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    figures = depth_figures(depth_sums(predicted, true) + other)
    assert figures["rmse"] == pytest.approx(math.sqrt((0.04 + 0 + 1 + 1.5625 + 1) / 5))
    assert figures["abs_rel"] == pytest.approx((0.2 + 0 + 0.25 + 0.25 + 0.5) / 5)
    assert figures["delta1"] == 2 / 5  # a factor of just 1.25 is not below it


def test_depth_losses() -> None:
    rng = np.random.default_rng(seeded(0))
    true, predicted = rng.uniform(0.5, 8, (2, 5, 7)), rng.uniform(0.5, 8, (2, 5, 7))
    seen = rng.random((2, 5, 7)) < 0.7
    masked = torch.from_numpy(np.where(seen, true, 0))
    g = np.log(predicted[seen] / true[seen])
    expected = math.sqrt(g.var() + 0.15 * g.mean() ** 2)
    assert float(silog_loss(torch.from_numpy(predicted), masked)) == pytest.approx(expected)
    assert float(l1_loss(torch.from_numpy(predicted), masked)) == pytest.approx(np.abs(predicted - true)[seen].mean())
    for loss in (silog_loss, l1_loss):
        guess = torch.from_numpy(predicted).requires_grad_()
        loss(guess, masked).backward()
        assert guess.grad is not None and not guess.grad[masked == 0].any() and guess.grad[masked > 0].any()
        nothing = torch.from_numpy(predicted).requires_grad_()
        loss(nothing, torch.zeros(2, 5, 7)).backward()
        assert nothing.grad is not None and not nothing.grad.any()
        exact = torch.ones(2, 2, requires_grad=True)
        loss(exact, torch.ones(2, 2)).backward()
        assert exact.grad is not None and exact.grad.isfinite().all()


def test_expected_depth() -> None:
    logits = torch.full((1, 11, 2, 3), -5.0)
    torch.testing.assert_close(expected_depth(logits, 1.0, 9.0), torch.full((1, 2, 3), 5.0))  # all alike: the middle
    logits[:, 10, 0, 0] = 1e6
    logits[:, 3, 0, 1] = 0.9  # weights 1 and 10 times 0.1; the bins 1, 1.8 ... 9 have a sum of 55
    depth = expected_depth(logits, 1.0, 9.0)
    assert float(depth[0, 0, 0]) == pytest.approx(9, abs=1e-3)
    assert float(depth[0, 0, 1]) == pytest.approx((0.1 * (55 - 3.4) + 3.4) / 2)
