"""The demo's images, its teacher and its page."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.chains.demo import TEACHER, demo
from pipeline.chains.digits import digit_image, digit_images, split_indices
from pipeline.config import load_config, resource
from pipeline.data.views import normalise
from pipeline.models.loading import load_saved
from singer.artifacts import patch_norms, robust_threshold
from singer.backbones import block_outputs
from singer.errors import UserError


def test_digits_are_pure_and_disjoint() -> None:
    train, test = split_indices("train"), split_indices("test")
    assert (len(train), len(test)) == (1297, 500) and not set(train) & set(test)
    a, b, c = digit_image("train", 3, 0), digit_image("train", 3, 0), digit_image("train", 3, 1)
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    images = list(digit_images("test", 1))
    assert len({key for key, _, _ in images}) == 500 and images[0][1].size == (64, 64)
    assert min(Counter(label for _, _, label in images).values()) > 40


def test_teacher_reads_digits_and_has_the_planted_artifacts() -> None:
    """What data/demo_teacher/README.md claims."""
    teacher = load_saved(resource(TEACHER))
    images, labels = zip(*[(np.asarray(i), label) for _, i, label in digit_images("test", 1)], strict=True)
    x = normalise(torch.from_numpy(np.stack(images)), teacher.mean, teacher.std)
    with torch.inference_mode():
        right = (teacher.model(x).argmax(1) == torch.tensor(labels)).float().mean()
        tokens = block_outputs(teacher.model, x, [2, 3, 5])
    assert float(right) > 0.92
    for block, low, high in ((2, 0, 0.005), (3, 0.02, 0.04), (5, 0.02, 0.04)):
        norms = patch_norms(tokens[block], 1)
        share = float((norms > robust_threshold(norms, 6)).float().mean())
        assert low <= share <= high, block
    assert (resource(TEACHER) / "model.safetensors").stat().st_size <= 4_000_000


def test_demo_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened: one drawing of every fourth digit, one epoch; the page must hold all it promises."""
    monkeypatch.setattr("pipeline.chains.demo.COPIES", {"train": 1, "test": 1})
    monkeypatch.setattr("pipeline.chains.digits.split_indices", lambda split: split_indices(split)[::4])
    config = load_config("demo", ["distill.epochs=1", "refine.steps=30", "evaluate.strengths=[0.1]"])
    result = demo(config, tmp_path / "demo")
    page = result.report.read_text()
    for text in ("planted", "FitNet", "SiNGER", "data:image/png;base64,", "What refining did", "Leaderboard"):
        assert text in page
    assert "http" not in page and "<script" not in page
    ratios = result.mean_max_over_median
    assert ratios["teacher"] > 5 > ratios["refined teacher"] and {"fitnet", "singer"} < set(ratios)
    assert set(result.linear) == {"FitNet", "SiNGER", "teacher"} and result.linear["teacher"]["cls"]["top1"] > 75
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        demo(config, tmp_path / "demo")
