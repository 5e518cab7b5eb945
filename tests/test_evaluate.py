"""Probes: right on features with known answers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vit, world_config
from sklearn.datasets import make_classification

from pipeline.config import Config, load_config
from pipeline.distill import distill
from pipeline.evaluate import evaluate
from pipeline.models import save_vit
from pipeline.probes.classification import features, linear_scores
from pipeline.shards import index_shards
from singer.probes import knn_scores, topk_percent

CPU = torch.device("cpu")


def blobs(noise: float, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 400)
    centres = np.random.default_rng(99).normal(size=(classes, 8))
    return torch.from_numpy((centres[labels] + noise * rng.normal(size=(400, 8))).astype("f4")), torch.from_numpy(
        labels
    )


def test_perfect_features_and_chance() -> None:
    settings = load_config().evaluate
    (x, y), (test_x, test_y) = blobs(0.01), blobs(0.01, seed=1)
    assert topk_percent(linear_scores(x, y, test_x, 5, settings), test_y, 1) == 100
    assert topk_percent(knn_scores(x, y, test_x, 5, 20, 0.07), test_y, 1) == 100
    shuffled = y[torch.randperm(len(y))]
    for scores in (linear_scores(x, shuffled, test_x, 5, settings), knn_scores(x, shuffled, test_x, 5, 20, 0.07)):
        assert topk_percent(scores, test_y, 1) < 45
    noise_x, noise_y = torch.randn(400, 8), torch.randint(0, 5, (400,))
    assert topk_percent(linear_scores(noise_x, noise_y, torch.randn(400, 8), 5, settings), noise_y, 1) < 30


def test_two_classes_and_classes_without_images() -> None:
    settings = load_config().evaluate
    x, y = make_classification(200, 6, random_state=0, class_sep=4.0)
    x, y = torch.from_numpy(x.astype("f4")), torch.from_numpy(3 * y.astype("i8"))  # labels 0 and 3 of 4
    scores = linear_scores(x, y, x, 4, settings)
    assert scores.shape == (200, 4) and topk_percent(scores, y, 1) > 90
    assert torch.isinf(scores[:, 1:3]).all()
    with pytest.raises(ValueError, match="one class only"):
        linear_scores(x, torch.zeros(200, dtype=torch.int64), x, 1, settings.model_copy(update={"strengths": (1.0,)}))


def test_run_is_probed_and_the_result_kept(world: Path, config: Config, tmp_path: Path) -> None:
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    shards = str(world / "train" / "*.tar"), str(world / "test" / "*.tar")
    result = evaluate(config, tmp_path / "run", *shards)
    assert result.classes == 4 and (result.train_images, result.test_images) == (100, 40)
    assert set(result.linear) == set(result.knn) == {"cls", "mean_patch"}
    assert result.linear["mean_patch"]["top1"] > 60  # colours are easy; chance is 25
    assert result.written is not None
    stored = json.loads(result.written.read_text())
    assert stored["linear"] == result.linear and stored["train"] == [f"train-{i:06d}.tar" for i in range(4)]
    evaluate(config, tmp_path / "run", *shards)
    assert len(list((tmp_path / "run").glob("evaluate-*.json"))) == 1
    evaluate(world_config(world, "evaluate.tokens=norm"), tmp_path / "run", *shards)
    assert len(list((tmp_path / "run").glob("evaluate-*.json"))) == 2


def test_features_do_not_depend_on_batches(world: Path) -> None:
    vit = make_vit()
    images = index_shards(str(world / "test" / "*.tar"))
    wide, narrow = (load_config(sets=[f"evaluate.batch_size={n}"]).evaluate for n in (64, 7))
    a, b = features(vit, images, wide, CPU), features(vit, images, narrow, CPU)
    for name in ("cls", "mean_patch"):
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_model_folder_without_cls(world: Path, config: Config, tmp_path: Path) -> None:
    vit = make_vit("vit_base_patch16_siglip_224", num_classes=0)
    save_vit(vit, vit.model.state_dict(), tmp_path / "m")
    result = evaluate(config, tmp_path / "m", str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    assert set(result.linear) == {"mean_patch"} and result.written is None
    assert [f.name for f in sorted((tmp_path / "m").iterdir())] == ["config.json", "model.safetensors"]


def test_labels_of_test_must_be_known(world: Path, config: Config, tmp_path: Path) -> None:
    from conftest import draw_images

    from pipeline.prepare import prepare

    draw_images(tmp_path / "in", 2, 5)
    prepare(config, tmp_path / "in", tmp_path / "two")
    shards = str(tmp_path / "two" / "*.tar"), str(world / "test" / "*.tar")
    with pytest.raises(ValueError, match=r"classes\.json number classes differently; prepare the second with"):
        evaluate(config, world / "teacher", *shards)
    (tmp_path / "two" / "classes.json").unlink()
    with pytest.raises(ValueError, match="--test has label 3, but --train only 0 to 1"):
        evaluate(config, world / "teacher", *shards)
