"""With the shared real teacher and images, where they lie beside the checkout; skipped elsewhere."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import load_config
from pipeline.data import ImageFile, index_images
from pipeline.data.views import apply_view, crop_view, normalise
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.refine import refine
from pipeline.teachers.teacher import load_teacher

SHARED = Path(os.environ.get("SINGER_SHARED", Path(__file__).parent.parent.parent / "shared"))
WEIGHTS = SHARED / "teachers" / "vit_tiny_patch16_224_augreg.safetensors"
DATA = SHARED / "datasets"
pytestmark = pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no real teacher at {WEIGHTS}")


def test_real_artifacts_are_removed(tmp_path: Path) -> None:
    """On a few frames of video, with short training; its artifacts grew by themselves, to 20 times the median norm."""
    config = load_config("tinyimagenet-ti-to-w96", [f"teacher.weights={WEIGHTS}", "refine.steps=100"])
    shard = str(DATA / "camvid-test-0000.tar")
    cache = cache_teacher(config, shard, tmp_path / "cache")
    small = load_config("tinyimagenet-ti-to-w96", ["refine.steps=150", "refine.batch_size=16"])
    blocks = refine(small, cache.cache, tmp_path / "adapters").blocks
    for figures in blocks.values():
        before, after = figures["before"], figures["after"]
        assert before["max_over_median"] > 10 and after["max_over_median"] < 4  # type: ignore[index]
        assert after["artifact_percent"] <= 0.6 * before["artifact_percent"]  # type: ignore[index]


@pytest.mark.slow
def test_teacher_reaches_its_accuracy() -> None:
    """83.0 % at 256 px, the size of most of these images; timm's own transform gives 80.0 % at 224 px (crop 0.9)."""
    sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={WEIGHTS}", "teacher.image_size=256"]
    teacher = load_teacher(load_config(sets=sets).teacher)
    images = index_images(str(DATA / "imagenet1k-sample-*.tar"))
    right = 0
    with ImageFile(images) as files:
        for numbers in np.array_split(np.arange(len(images)), 20):
            decoded = [files.read(int(n)) for n in numbers]
            views = np.stack([apply_view(i, crop_view(1.0, i.size), 256) for i in decoded])
            x = normalise(torch.from_numpy(views), teacher.mean, teacher.std)
            with torch.inference_mode():
                right += int((teacher.model(x).argmax(1).numpy() == images.labels[numbers]).sum())
    assert right / len(images) >= 0.83
