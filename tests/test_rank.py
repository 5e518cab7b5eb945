"""Which teacher suits a data set: scores against SciPy and NumPy, and the command on caches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_vit, run_singer, seeded, world_config
from scipy.stats import spearmanr

from pipeline.cache import Cache
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import LOCAL
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.rank import one_hot, rank
from singer.errors import UserError
from singer.transfer import cka, parc, teacher_weights


def test_parc() -> None:
    """By SciPy, whose ties share their mean rank, too."""
    torch.manual_seed(seeded(0))
    features, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    pairs = np.tril_indices(40, -1)
    ours = (1 - np.corrcoef(features.double().numpy()))[pairs]
    # Of one-hot labels there are two correlations; rounding would part what is equal.
    theirs = (1 - np.corrcoef(np.eye(3)[labels.numpy()]))[pairs].round(6)
    assert parc(features, labels) == pytest.approx(spearmanr(ours, theirs).statistic, abs=1e-6)
    # Features that are the classes fit them best; the labels of others are nothing to them.
    clear = torch.eye(3)[labels] + 0.01 * features[:, :3]
    assert parc(clear, labels) > 0.7 > parc(features, labels)


def test_cka() -> None:
    torch.manual_seed(seeded(1))
    a, b = torch.randn(30, 6), torch.randn(30, 9)
    x, y = ((z - z.mean(0)).double().numpy() for z in (a, b))
    by_covariance = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert cka(a, b) == pytest.approx(by_covariance, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert cka(a, 3 * a @ rotation + 1) == pytest.approx(1, abs=1e-5)


def test_classes_may_have_any_numbers() -> None:
    """A column for each number up to a date would fill the memory."""
    assert one_hot(torch.tensor([3, 20190101, 3])).tolist() == [[1, 0], [0, 1], [1, 0]]


def test_teacher_weights() -> None:
    assert teacher_weights([0.2, 0.1, -1.0]) == pytest.approx([0.8, 0.2, 0])
    assert teacher_weights([-1.0, 0.0]) == [0.5, 0.5]


@pytest.fixture(scope="module")
def blind(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the same images by a teacher that is blind to colours, which are the classes."""
    root = tmp_path_factory.mktemp("blind")
    teacher = make_vit(seed=3)
    with torch.no_grad():
        weight = teacher.model.patch_embed.proj.weight
        weight.copy_(weight.mean(1, keepdim=True).expand_as(weight))
    save_backbone(teacher, teacher.model.state_dict(), root / "teacher")
    config = world_config(world, f"teacher.name={LOCAL}{root / 'teacher'}")
    cache_teacher(config, str(world / "train" / "*.tar"), root / "cache")
    return root / "cache"


def test_the_teacher_that_sees_classes_is_first(
    world: Path, blind: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_singer(monkeypatch, "rank", blind, world / "cache", "--images", 60, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    first, last = result["teachers"]
    assert (first["cache"], last["cache"]) == (str(world / "cache"), str(blind))
    assert result["by"] == "parc" and result["classes"] == 4 and result["images"] == 60
    assert result["teacher_weights"] == [last["weight"], first["weight"]]
    assert sum(result["teacher_weights"]) == pytest.approx(1)
    assert first["agreement"] == last["agreement"] < 1
    cache = Cache(world / "cache")
    chosen = np.linspace(0, len(cache) - 1, 60).astype(int)
    tokens = cache.features(chosen, torch.device("cpu"))[3]
    labels = torch.from_numpy(cache.index.images.labels[cache.index.image[chosen]].astype(np.int64))
    assert first["parc"] == pytest.approx(parc(tokens[:, 0], labels), abs=1e-6)


def test_without_labels_agreement_ranks(world: Path, blind: Path, tmp_path: Path) -> None:
    """Of three teachers, two are nearly the same, and the third agrees with neither."""
    places = []
    for name, precision in (("a", "no"), ("b", "bf16")):
        config = world_config(world, f"cache.precision={precision}")
        images = tmp_path / "images"
        if not images.exists():
            shutil.copytree(world / "images" / "train", images)
            for n, file in enumerate(sorted(images.rglob("*.png"))):
                file.rename(images / f"{n:03}.png")
            shutil.rmtree(images / "class0", ignore_errors=True)
        cache_teacher(config, str(images), tmp_path / name)
        places.append(tmp_path / name)
    with pytest.raises(UserError, match="nothing to rank by"):
        rank(places[:1])
    result = rank(places)
    assert result.by == "agreement" and all(t.parc is None for t in result.teachers)
    assert result.teachers[0].agreement == pytest.approx(1, abs=1e-3)
