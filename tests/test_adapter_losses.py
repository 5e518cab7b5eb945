"""The forms of L_outlier and L_info against closed forms in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WIDTH, make_vit
from torch import Tensor

from singer.adapter_losses import INFO_FORMS, OUTLIER_FORMS, RefinementBatch, adapter_losses, expect_loss
from singer.artifacts import BlockScale
from singer.errors import UserError
from singer.suffix import TeacherSuffix, suffix_state

SCALE = BlockScale(median=2.0, threshold=4.0)


def make_batch() -> RefinementBatch:
    vit = make_vit()
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    original = {b: torch.randn(3, 17, WIDTH) for b in (2, 3)}
    refined = {b: x + 0.3 * torch.randn_like(x) for b, x in original.items()}
    grids: dict[int, tuple[int, int] | None] = dict.fromkeys((2, 3), (4, 4))
    return RefinementBatch(original, refined, suffix, dict.fromkeys((2, 3), BlockScale(5.0, 6.0)), 1, grids)


def gram(tokens: Tensor) -> np.ndarray:
    x = tokens.double().numpy()
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit @ unit.transpose(0, 2, 1)


@pytest.mark.parametrize(("form", "power"), [("paper", 1), ("official", 2)])
def test_quantile_outliers(form: str, power: int) -> None:
    norms = torch.rand(4, 50, requires_grad=True)
    x = norms.detach().numpy()
    limit = np.quantile(x, 0.9, axis=1, keepdims=True)
    excess = (x - limit)[x > limit]
    assert len(excess) == 4 * 5
    loss = OUTLIER_FORMS[form](norms, SCALE, 0.9)
    assert loss.item() == pytest.approx((excess**power).mean(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, norms)
    # The quantile is not a path for the gradient: only the tokens above it are pushed.
    assert torch.equal(gradient > 0, norms > torch.from_numpy(limit).float())


def test_equal_norms_are_no_outliers() -> None:
    for form in ("paper", "official"):
        assert OUTLIER_FORMS[form](torch.ones(2, 9), SCALE, 0.9).item() == 0


def test_paper_info_is_the_gram_behind_the_next_block() -> None:
    batch = make_batch()
    with torch.no_grad():
        next_block_outputs = [gram(batch.known_suffix.block(3)(x[2])[:, 1:]) for x in (batch.refined, batch.original)]
    expected = np.square(next_block_outputs[0] - next_block_outputs[1]).mean()
    assert INFO_FORMS["paper"](batch, 2).item() == pytest.approx(expected, rel=1e-3)
    last = np.square(gram(batch.refined[3][:, 1:]) - gram(batch.original[3][:, 1:])).mean()
    assert INFO_FORMS["paper"](batch, 3).item() == pytest.approx(last, rel=1e-3)


def test_official_info() -> None:
    batch = make_batch()
    with torch.no_grad():
        a, b = (batch.known_suffix.block(3)(x[2]).numpy() for x in (batch.refined, batch.original))
    assert INFO_FORMS["official"](batch, 2).item() == pytest.approx(np.square(a - b).mean(), rel=1e-4)
    last = np.square(gram(batch.refined[3][:, 1:]) - gram(batch.refined[2][:, 1:])).mean()
    assert INFO_FORMS["official"](batch, 3).item() == pytest.approx(last, rel=1e-3)
    alone = RefinementBatch({3: batch.original[3]}, {3: batch.refined[3]}, batch.suffix, batch.scales, 1)
    with pytest.raises(UserError, match="needs an intermediate block besides the last; cache another block"):
        INFO_FORMS["official"](alone, 3)


def test_clean_info_leaves_artifacts_out() -> None:
    batch = make_batch()
    batch.original[3][:, 4] *= 20
    batch.refined[3][:, 4] = 0
    same = RefinementBatch(batch.original, batch.original, batch.suffix, batch.scales, 1)
    spoiled = {3: batch.original[3].clone()}
    spoiled[3][:, 4] = torch.randn(3, WIDTH)
    changed = RefinementBatch(batch.original, spoiled, batch.suffix, batch.scales, 1)
    assert INFO_FORMS["clean"](same, 3).item() == pytest.approx(0, abs=1e-10)
    assert INFO_FORMS["clean"](changed, 3).item() == pytest.approx(0, abs=1e-10)
    assert INFO_FORMS["paper"](changed, 3).item() > 1e-3


def test_parts_are_named_by_loss_and_block() -> None:
    weights = {"outlier": 0.5, "info": 2.0}
    losses = adapter_losses(make_batch(), [2, 3], "robust", "clean", 0.9, {**weights, "keep": 3.0, "expect": 0.1})
    assert {n: [*of] for n, of in losses.parts.items()} == {n: [2, 3] for n in ("outlier", "info", "expect", "keep")}
    assert [*adapter_losses(make_batch(), [2], "paper", "paper", 0.9, weights).parts] == ["outlier", "info"]
    without = adapter_losses(replace(make_batch(), suffix=None), [2], "robust", "clean", 0.9, weights)
    assert [*without.parts] == [*without.weighted] == ["outlier"]
    for name, mean in losses.weighted.items():
        of_name = [loss.item() for loss in losses.parts[name].values()]
        assert mean.item() == pytest.approx(losses.weights[name] * sum(of_name) / 2)
    assert losses.total.item() == pytest.approx(sum(mean.item() for mean in losses.weighted.values()))


def test_expect_by_hand() -> None:
    """The squared distance of artifacts from the mean of clean neighbours, over that of clean tokens."""
    batch = make_batch()
    batch.original[3][:, 6] *= 20
    x, y = (of[3][:, 1:].double().numpy().reshape(3, 4, 4, -1) for of in (batch.original, batch.refined))
    clean = np.linalg.norm(x, axis=-1) <= 6
    assert not clean[:, 1, 1].any() and clean.mean() > 0.5
    away: dict[bool, list[float]] = {True: [], False: []}
    for image, row, column in np.ndindex(3, 4, 4):
        near = image, slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
        expected = x[near][clean[near]].mean(0)
        is_clean = bool(clean[image, row, column])
        away[is_clean].append(np.square((x if is_clean else y)[image, row, column] - expected).sum())
    assert expect_loss(batch, 3).item() == pytest.approx(np.mean(away[False]) / np.mean(away[True]), rel=1e-4)


def test_artifacts_without_a_clean_token_add_nothing() -> None:
    """Nothing says how far from their neighbours tokens are; the loss had 12 digits."""
    batch = make_batch()
    refined = batch.refined[3].requires_grad_()
    for whole in (batch.original, {3: torch.zeros(3, 17, WIDTH)}):
        loss = expect_loss(replace(batch, original=whole, refined={3: refined}, scales={3: BlockScale(1.0, -1.0)}), 3)
        loss.backward()
        assert loss == 0 and refined.grad is not None and not refined.grad.any()
