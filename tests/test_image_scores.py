"""Which images are trained on: scores against NumPy, and the share that they choose."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded, world_config

from pipeline.cache import Cache
from pipeline.training.held_out import split_images
from pipeline.training.image_scores import image_scores, prototype_distance
from singer.errors import UserError

CPU = torch.device("cpu")


def test_el2n(world: Path) -> None:
    """By hand from the teacher's class probabilities, whatever blocks are distilled."""
    cache = Cache(world / "cache", blocks=[2])
    logits = cache.suffix().logits(Cache(world / "cache").features(range(100), CPU)[3], 3).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p[np.arange(100), p.argmax(-1)] -= 1
    np.testing.assert_allclose(image_scores(cache, "el2n", 0), np.sqrt((p**2).sum(-1)), rtol=1e-4)


def test_distance_from_prototypes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are far from two tight groups are the hardest."""
    rng = np.random.default_rng(seeded(0))
    centres = np.eye(24)[:2]
    tokens = np.repeat(centres, [50, 48], axis=0) + 0.01 * rng.standard_normal((98, 24))
    odd = (0.7 * centres[0] - 0.7 * np.eye(24)[5], 0.6 * centres[1] - 0.8 * np.eye(24)[5])
    # Directions count, and not lengths.
    lengths = rng.uniform(0.1, 10, (100, 1))
    planted = torch.from_numpy(lengths * np.concatenate([tokens, odd])).float()
    monkeypatch.setattr("pipeline.training.image_scores._IMAGES_OF_A_CLUSTER", 50)
    monkeypatch.setattr("pipeline.training.image_scores.batches", lambda *_: iter([{3: planted[:, None]}]))
    found = prototype_distance(Cache(world / "cache", blocks=[3]), np.arange(100), seeded(0)).numpy()
    assert {*np.argsort(-found)[:2]} == {98, 99} and found[98:].min() > 0.2 > 0.01 > np.median(found)


@pytest.mark.parametrize("by", ["el2n", "prototypes"])
def test_scores_choose_the_share(world: Path, by: str) -> None:
    """The hardest or the easiest of the images that are not held out; a smaller share is a part of a larger one."""
    cache, settings = Cache(world / "cache"), world_config(world).distill
    scores = image_scores(cache, by, settings.seed)
    chosen = {}
    for share, keep in ((0.2, "hard"), (0.5, "hard"), (0.5, "easy")):
        values = {"share": share, "share_by": by, "share_keep": keep, "holdout": 0.1}
        train, held = split_images(cache, settings.model_copy(update=values))
        assert train is not None and len(train) == round(90 * share) and not {*train} & {*held}
        left = np.setdiff1d(np.arange(100), [*train, *held])
        assert scores[train].min() >= scores[left].max() or keep == "easy"
        assert scores[train].max() <= scores[left].min() or keep == "hard"
        chosen[share, keep] = {*train.tolist()}
    assert chosen[0.2, "hard"] < chosen[0.5, "hard"] and not chosen[0.5, "hard"] & chosen[0.5, "easy"]


def test_el2n_needs_a_head(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(world / "cache")
    suffix = cache.suffix()
    suffix.model.num_classes = 0
    monkeypatch.setattr(Cache, "suffix", lambda _: suffix)
    with pytest.raises(UserError, match=r"distill\.share_by el2n needs .* a head on it; take prototypes"):
        image_scores(cache, "el2n", 0)
