"""The method's arithmetic, each part against an independent computation."""

import numpy as np
import pytest
import torch
from conftest import DEPTH, WIDTH, make_vit, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from singer.adapter_losses import cosine_gram, gram_error, keep_loss, robust_outlier
from singer.artifacts import BlockScale, norm_summary, robust_threshold
from singer.cleaners import Adapter, BlockSpec, Clip
from singer.errors import UserError
from singer.matching import match_blocks
from singer.metrics import knn_among, knn_scores, topk_hits
from singer.normalisers import Standardize
from singer.objectives import OBJECTIVES, ObjectiveContext
from singer.refiner import Refiner
from singer.subspaces import reader_weight, smallest_directions
from singer.suffix import TeacherSuffix, suffix_state
from singer.tokens import resize_tokens


def make_tail(first: int = 2, **args: object) -> TeacherSuffix:
    vit = make_vit(**args)
    return TeacherSuffix(vit.architecture, vit.model_args, first, suffix_state(vit.model.state_dict(), first))


def test_threshold_ignores_a_minority_of_artifacts() -> None:
    norms = torch.from_numpy(np.random.default_rng(seeded(0)).normal(10, 1, 20_000)).float()
    assert robust_threshold(norms, 6) == pytest.approx(16, abs=0.2)
    spoiled = norms.clone()
    spoiled[:400] = 570
    assert robust_threshold(spoiled, 6) == pytest.approx(robust_threshold(norms, 6), rel=0.02)


def test_norm_summary() -> None:
    summary = norm_summary(torch.tensor([[1.0] * 98 + [10.0, 30.0]]), 5.0)
    expected = {"median": 1.0, "p99": 30.0, "max": 30.0, "max_over_median": 30.0, "artifact_percent": 2.0}
    assert summary == pytest.approx(expected)


def test_smallest_directions_are_the_smallest() -> None:
    weight = torch.randn(40, 16)
    directions = smallest_directions(weight, 5)
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), atol=1e-5, rtol=0)
    _, values, right = np.linalg.svd(weight.numpy())
    expected = right[-5:].T @ right[-5:]
    np.testing.assert_allclose((directions @ directions.T).numpy(), expected, atol=1e-4)
    assert np.all(np.diff(np.linalg.norm(weight.numpy() @ directions.numpy(), axis=0)) > 0)
    np.testing.assert_allclose(np.linalg.norm(weight.numpy() @ directions.numpy()[:, 0]), values[-1], rtol=1e-3)
    with pytest.raises(UserError, match="refine.rank 17 is larger than the feature width 16"):
        smallest_directions(weight, 17)


def test_reader_weights() -> None:
    suffix = make_tail()
    mlp = suffix.block(3).mlp
    x = torch.randn(WIDTH)
    torch.testing.assert_close(reader_weight(suffix, 2) @ x, mlp.fc2.weight @ (mlp.fc1.weight @ x))
    # Behind the last block: what head and norm see of a token, but for the norm's division.
    nn.init.normal_(suffix.model.norm.weight)
    seen = suffix.model.head.weight @ (suffix.model.norm.weight * (x - x.mean()))
    torch.testing.assert_close(reader_weight(suffix, 3) @ x, seen, atol=1e-5, rtol=1e-4)
    headless = make_tail(num_classes=0)
    last = headless.block(3).mlp
    torch.testing.assert_close(reader_weight(headless, 3), last.fc2.weight @ last.fc1.weight)


def test_outlier_loss_by_hand() -> None:
    norms = torch.tensor([[1.0, 5.0, 9.0], [2.0, 3.0, 4.0]], requires_grad=True)
    loss = robust_outlier(norms, BlockScale(median=2.0, threshold=4.0), 0.97)
    assert loss.item() == pytest.approx((0.5**2 + 2.5**2) / 6)
    loss.backward()
    assert norms.grad is not None
    assert (norms.grad > 0).tolist() == [[False, True, True], [False, False, False]]


def test_info_loss_by_hand() -> None:
    a, b = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    clean = torch.tensor([[True, True, False, True], [True] * 4])
    total, pairs = 0.0, 0
    for i in range(2):
        for p in range(4):
            for q in range(4):
                if clean[i, p] and clean[i, q]:
                    cosines = [float(torch.cosine_similarity(x[i, p], x[i, q], dim=0)) for x in (a, b)]
                    total += (cosines[0] - cosines[1]) ** 2
                    pairs += 1
    assert gram_error(a, b, clean).item() == pytest.approx(total / pairs, rel=1e-5)
    assert gram_error(a, a * 3, clean).item() == pytest.approx(0, abs=1e-10)
    assert cosine_gram(a).diagonal(dim1=1, dim2=2).sub(1).abs().max() < 1e-6


def test_keep_loss_by_hand() -> None:
    x, change = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    clean = torch.rand(2, 5) < 0.7
    a, c = x[clean].numpy(), change[clean].numpy()
    expected = c.var(0).sum() / a.var(0).sum()
    assert keep_loss(x + change, x, clean).item() == pytest.approx(expected, rel=1e-4)
    assert keep_loss(x + 5.0, x, clean).item() == pytest.approx(0, abs=1e-6)
    assert keep_loss(torch.zeros_like(x), x, clean).item() == pytest.approx(1, rel=1e-5)


def test_adapter_starts_as_identity_and_spares_prefix_tokens() -> None:
    adapter = Adapter(BlockSpec(8, 1, (2, 2), rank=3))
    x = torch.randn(2, 5, 8)
    directions = torch.linalg.qr(torch.randn(8, 3)).Q
    adapter.start(directions, BlockScale(1.0, 2.0))
    torch.testing.assert_close(adapter(x), x)
    with torch.no_grad():
        adapter.up.copy_(-directions.T)
    refined = adapter(x)
    torch.testing.assert_close(refined[:, :1], x[:, :1])
    assert (refined[:, 1:] @ directions).abs().max() < 1e-5
    assert not torch.equal(refined[:, 1:], x[:, 1:])


def test_clip() -> None:
    clip = Clip(BlockSpec(4, 1, None))
    clip.threshold.fill_(2.0)
    x = torch.randn(3, 6, 4) * 3
    y = clip(x)
    torch.testing.assert_close(y[:, :1], x[:, :1])
    assert y[:, 1:].norm(dim=-1).max() <= 2.0 + 1e-5
    torch.testing.assert_close(nn.functional.normalize(y, dim=-1), nn.functional.normalize(x, dim=-1))


def test_standardize_treats_prefix_tokens_apart() -> None:
    layer = Standardize(BlockSpec(3, 1, None))
    layer.mean.fill_(2.0)
    layer.std.fill_(4.0)
    layer.prefix_mean.fill_(-1.0)
    x = torch.full((1, 3, 3), 6.0)
    assert layer(x)[0, :, 0].tolist() == [7.0, 1.0, 1.0]


def test_refiner_of_nothing_is_the_identity() -> None:
    refiner = Refiner({1: BlockSpec(4, 1, None), 3: BlockSpec(4, 1, None)}, "none", "none")
    x = {1: torch.randn(2, 3, 4), 3: torch.randn(2, 3, 4)}
    assert all(torch.equal(y, x[b]) for b, y in refiner(x).items())
    normal = Refiner({1: BlockSpec(4, 1, None)}, "none", "layernorm")({1: x[1]})[1]
    torch.testing.assert_close(normal.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("blocks", "depth", "student", "expected"),
    [
        ([8, 11], 12, 12, {8: 8, 11: 11}),  # equal depths: the identity
        ([8, 11], 12, 4, {8: 2, 11: 3}),
        ([17, 23], 24, 12, {17: 8, 23: 11}),
        ([11], 12, 1, {11: 0}),
        ([9, 10, 11], 12, 3, {9: 0, 10: 1, 11: 2}),  # crowded: each student block once, in order
        ([0, 23], 24, 12, {0: 0, 23: 11}),
    ],
)
def test_match_blocks(blocks: list[int], depth: int, student: int, expected: dict[int, int]) -> None:
    assert match_blocks(blocks, depth, student) == expected


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_matching_is_monotone_and_ends_meet(teacher: int, student: int, data: st.DataObject) -> None:
    blocks = sorted(data.draw(st.sets(st.integers(0, teacher - 1), min_size=1, max_size=min(teacher, student))))
    matched = match_blocks(blocks, teacher, student)
    chosen = list(matched.values())
    assert list(matched) == blocks and chosen == sorted(set(chosen))
    if blocks[-1] == teacher - 1:
        assert chosen[-1] == student - 1
    if teacher == student:
        assert chosen == blocks


def test_too_many_blocks_to_match() -> None:
    with pytest.raises(UserError, match="3 teacher blocks cannot be matched to 2 student blocks"):
        match_blocks([1, 2, 3], 4, 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2))
def test_resize_keeps_prefix_and_constants(rows: int, target: int, prefix: int) -> None:
    tokens = torch.randn(2, prefix + rows * rows, 3)
    tokens[:, prefix:] = tokens[:, prefix : prefix + 1]
    resized = resize_tokens(tokens, prefix, (rows, rows), (target, target))
    assert resized.shape == (2, prefix + target * target, 3)
    torch.testing.assert_close(resized[:, :prefix], tokens[:, :prefix])
    torch.testing.assert_close(resized[:, prefix:], tokens[:, prefix : prefix + 1].expand(2, target**2, 3))


def test_resize_keeps_orientation() -> None:
    ramp = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)  # grows by row
    small = resize_tokens(ramp, 0, (4, 4), (2, 2)).view(2, 2)
    assert small[0, 0] == small[0, 1] < small[1, 0] == small[1, 1]


def test_mse_is_a_mean_over_tokens_and_channels() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = ((a.numpy() - b.numpy()) ** 2).reshape(3, -1).mean(1)
    found = OBJECTIVES["mse"](ObjectiveContext((2,), 5, 0, (2, 2)))({2: a}, {2: b})
    np.testing.assert_allclose(found["2"].numpy(), expected, rtol=1e-5)


def test_cosine_is_blind_to_length() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    x, y = a.numpy(), b.numpy()
    cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    loss = OBJECTIVES["cosine"](ObjectiveContext((2,), 5, 0, (2, 2)))
    np.testing.assert_allclose(loss({2: a}, {2: b})["2"].numpy(), 1 - cosines.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss({2: a}, {2: 7 * b}), loss({2: a}, {2: b}))


def test_knn_against_scikit_learn() -> None:
    rng = np.random.default_rng(seeded(1))
    labels = rng.integers(0, 4, 200)
    train = rng.normal(size=(200, 6)) + labels[:, None]
    test = rng.normal(size=(50, 6)) + rng.integers(0, 4, 50)[:, None]

    def votes(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.1)

    reference = KNeighborsClassifier(7, weights=votes, metric="cosine", algorithm="brute").fit(train, labels)
    (scores,) = knn_scores(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(test), 4, 7, 0.1)
    assert scores.argmax(1).tolist() == reference.predict(test).tolist()


def test_knn_among_images_leaves_out_their_other_views() -> None:
    """Each row is judged by knn_scores of all rows of other images; rows without a label are not there."""
    generator = torch.Generator().manual_seed(seeded(0))
    groups, labels = torch.arange(40) // 2, torch.randint(4, (20,), generator=generator).repeat_interleave(2)
    centres = torch.randn(4, 8, generator=generator)
    x = centres[labels] + torch.randn(20, 8, generator=generator).repeat_interleave(2, 0)  # both views are the same
    labels[6:10] = -1
    known = labels >= 0
    right = []
    for row in torch.nonzero(known).flatten().tolist():
        others = known & (groups != groups[row])
        (scores,) = knn_scores(x[others], labels[others], x[row : row + 1], 4, 5, 0.07)
        right.append(int(scores.argmax()) == int(labels[row]))
    found = knn_among(x, labels, groups, 5, 0.07)
    assert found == pytest.approx(100 * sum(right) / len(right)) and 30 < found < 100
    assert knn_among(x, labels, groups, 500, 0.07) is not None  # more neighbours than rows
    for nothing in (torch.full_like(labels, -1), torch.zeros_like(labels)):
        assert knn_among(x, nothing, groups, 5, 0.07) is None
    assert knn_among(x, labels, torch.zeros_like(groups), 5, 0.07) is None


def test_knn_does_not_overflow() -> None:
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    (scores,) = knn_scores(train, labels, torch.eye(3), 3, 3, temperature=1e-3)
    assert scores.isfinite().all() and scores.argmax(1).tolist() == [0, 1, 2]


def test_a_class_without_a_vote_is_in_no_top5() -> None:
    """Three neighbours of two classes: the other four are not guessed, although five would fit."""
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [0.0, 1.0]])
    (scores,) = knn_scores(train, torch.tensor([4, 4, 5, 0]), torch.tensor([[1.0, 0.0]] * 6), 6, 3, 0.07)
    assert [topk_hits(scores[:1], torch.tensor([label]), 5).item() for label in range(6)] == [False] * 4 + [True] * 2


def test_topk_hits() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    labels = torch.tensor([2, 0])
    assert topk_hits(scores, labels, 1).tolist() == [False, True]
    assert topk_hits(scores, labels, 2).all()


def test_tail_has_no_front() -> None:
    suffix = make_tail()
    names = list(suffix.state_dict())
    assert not any("patch_embed" in n or "pos_embed" in n or ".0." in n or ".1." in n for n in names if "blocks" in n)
    assert all(not p.requires_grad for p in suffix.parameters())
    assert suffix.depth == DEPTH
