"""Probes of more features than memory holds: streamed from a file, with the same results."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_images, seeded, world_config
from PIL import Image
from sklearn.linear_model import LogisticRegression

from pipeline.config import load_config
from pipeline.evaluation import classification, feature_rows, global_features
from pipeline.evaluation.classification import accuracy, linear_scores
from pipeline.evaluation.feature_store import StoredFeatures
from pipeline.runtime import machine
from pipeline.stages.evaluate import evaluate
from singer import logistic, metrics
from singer.errors import UserError
from singer.metrics import knn_scores, retrieval_figures

CPU = torch.device("cpu")


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing fits; the list gets what was asked for."""
    asked: list[int] = []

    def fits(count: int, device: torch.device) -> bool:
        asked.append(count)
        return False

    for module in (feature_rows, classification):
        monkeypatch.setattr(module, "fits", fits)
    monkeypatch.setattr(classification, "_BLOCK", 64)
    return asked


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of 7 classes that overlap, with a large common mean, as real ones have."""
    random = np.random.default_rng(seeded(seed))
    centres = np.random.default_rng(seeded(50)).normal(size=(7, 20))
    labels = random.integers(0, 7, count)
    return torch.from_numpy(
        (30 + centres[labels] + 1.5 * random.normal(size=(count, 20))).astype("f4")
    ), torch.from_numpy(labels)


def test_a_streamed_regression_is_the_one_in_memory(no_room: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (test_x, test_y) = samples(1500, 1), samples(1000, 2)
    settings = load_config().evaluate
    streamed = torch.cat(list(linear_scores(x, y, test_x, 7, settings)))
    assert no_room
    monkeypatch.undo()
    (whole,) = linear_scores(x, y, test_x, 7, settings)
    torch.testing.assert_close(streamed, whole, atol=1e-3, rtol=1e-3)
    one = settings.model_copy(update={"strengths": (0.1,)})
    std, mean = torch.std_mean(x, 0, correction=0)
    theirs = LogisticRegression(C=0.1, max_iter=2000, tol=1e-8).fit(((x - mean) / std).numpy(), y.numpy())
    expected = 100 * theirs.score(((test_x - mean) / std).numpy(), test_y.numpy())
    assert abs(accuracy(linear_scores(x, y, test_x, 7, one), test_y)["top1"] - expected) <= 0.3


@pytest.mark.parametrize("size", [1, 7, 300])
def test_moments_of_blocks(size: int) -> None:
    x = samples(300, 5)[0]
    mean, std = feature_rows.moments(x.split(size))
    np.testing.assert_allclose(mean, x.numpy().astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, x.numpy().astype(np.float64).std(0), rtol=1e-12)


@pytest.mark.parametrize(("queries", "gallery"), [(1, 300), (7, 1), (50, 19), (5, 64), (64, 299)])
def test_blocks_change_no_neighbour_and_no_rank(queries: int, gallery: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (test_x, _) = samples(300, 3), samples(50, 4)
    (expected,) = knn_scores(x, y, test_x, 7, 20, 0.07)
    ranked = retrieval_figures(test_x, y[:50])
    monkeypatch.setattr(metrics, "_QUERIES", queries)
    monkeypatch.setattr(metrics, "_GALLERY", gallery)
    blocks = list(knn_scores(x, y, test_x, 7, 20, 0.07))
    assert {len(block) for block in blocks[:-1]} <= {queries}
    torch.testing.assert_close(torch.cat(blocks), expected, atol=1e-5, rtol=1e-4)
    assert retrieval_figures(test_x, y[:50]) == pytest.approx(ranked, abs=1e-6)
    monkeypatch.setattr(metrics, "_SIMILARITIES", 60)  # one query at a time
    assert retrieval_figures(test_x, y[:50]) == pytest.approx(ranked, abs=1e-6)


def test_a_classifier_needs_two_classes() -> None:
    with pytest.raises(UserError, match="needs two classes or more, not 1"):
        logistic.LogisticProblem(torch.randn(5, 3), torch.zeros(5, dtype=torch.long), 1)


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_the_loss_is_the_cross_entropy(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients, in blocks or at once, and where the share of the right class is too small for a float."""
    monkeypatch.setattr(logistic, "_LOGITS_ON_CPU", size)
    (x, y), scale = samples(300, 6), 60.0
    weight, bias = (
        torch.randn(7, *shape, generator=torch.Generator().manual_seed(seeded(3))) * scale
        for shape in ((x.shape[1],), ())
    )
    whole, by_weight, by_bias = logistic.LogisticProblem(x, y, 7).loss(weight, bias)
    head = [t.double().requires_grad_() for t in (weight, bias)]
    expected = torch.nn.functional.cross_entropy(x.double() @ head[0].T + head[1], y, reduction="sum")
    expected.backward()
    assert np.isfinite(whole) and whole == pytest.approx(expected.item(), rel=1e-6) and whole / len(x) > 100
    torch.testing.assert_close(by_weight.double(), head[0].grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(by_bias.double(), head[1].grad, atol=1e-3, rtol=1e-4)


def test_a_start_nearby_ends_at_the_same_minimum_sooner() -> None:
    x, y = samples(600, 6)
    problem = logistic.LogisticProblem((x - x.mean(0)) / x.std(0), y, 7)
    alone, near = (problem.fit(1.0, start, tol=1e-7) for start in (None, problem.fit(0.3)))
    assert alone.converged and near.converged and near.passes < alone.passes
    torch.testing.assert_close(near.weight, alone.weight, atol=2e-3, rtol=2e-2)


def test_fits_without_an_end_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those among which the penalty is chosen, too."""
    (x, y), fit = samples(200, 7), logistic.LogisticProblem.fit
    monkeypatch.setattr(logistic.LogisticProblem, "fit", lambda *args, **more: fit(*args, **more, max_passes=2))
    list(linear_scores(x, y, x, 7, load_config().evaluate))
    told = capsys.readouterr()
    notes = [line for line in (told.out + told.err).splitlines() if "has not converged in 2 passes" in line]
    assert len(notes) == 4 and sum("of 160 images, to choose" in note for note in notes) == 3


def test_rows_in_a_file(no_room: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no name, and takes its place before anything is computed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = feature_rows.empty_rows((100, 3))
    rows[7:9] = torch.arange(6.0).view(2, 3)
    assert rows[8].tolist() == [3, 4, 5] and rows.sum() == 15 and no_room == [300] and not list(tmp_path.iterdir())
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 1 and "(deleted)" in mapped[0]

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"take 1\.2e-06 GB, which {tmp_path} does not have .*; set TMPDIR"):
        feature_rows.empty_rows((100, 3))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_figures_do_not_depend_on_memory(
    world: Path, tmp_path: Path, task: str, no_room: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["evaluate.strengths=[0.1,1]", "evaluate.seg_classes=2", "evaluate.seg_passes=3", "evaluate.neighbours=5"]
    config, shards = world_config(world, *sets), (str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    if task == "segmentation":
        shards = tuple(str(with_masks(tmp_path / name, seed)) for seed, name in enumerate(("train", "test")))  # type: ignore[assignment]
    streamed = figures(evaluate(config, world / "teacher", *shards, task))
    assert no_room
    monkeypatch.undo()
    whole = figures(evaluate(config, world / "teacher", *shards, task))
    assert streamed.keys() == whole.keys() and streamed == pytest.approx(whole, abs=0.5)


def test_features_are_kept_and_gone_on_with(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption from the last batch, and later without the model; figures are the same."""
    sets = ["evaluate.batch_size=32", "evaluate.tokens=norm"]
    keep = f"evaluate.features={tmp_path / 'kept'}"

    def probe(*more: str) -> dict[str, float]:
        config = world_config(world, *sets, *more)
        return figures(evaluate(config, world / "teacher", None, str(world / "train" / "*.tar"), "retrieval"))

    whole, computed = probe(), list[int]()
    compute = global_features.feature_batches

    def watched(backbone: Any, images: Any, *rest: Any) -> Any:
        for batch in compute(backbone, images, *rest):
            if len(computed) == 2:
                raise KeyboardInterrupt
            computed.append(len(images))
            yield batch

    monkeypatch.setattr(global_features, "feature_batches", watched)
    with pytest.raises(KeyboardInterrupt):
        probe(keep)
    assert [json.loads(p.read_text()) for p in tmp_path.rglob("progress.json")] == [{"images": 64}]
    computed[:] = [0] * 3
    assert probe(keep) == whole and computed[3:] == [36] * 2  # what was left of 100 images
    assert probe(keep, "evaluate.batch_size=7") == whole and len(computed) == 5
    probe(keep, "evaluate.crop=0.9")  # other crops are other features
    assert computed[5:] == [100] * 4 and len(list(tmp_path.rglob("progress.json"))) == 2
    for file in tmp_path.rglob("norm.cls.npy"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"norm\.cls\.npy is damaged: .*; remove it"):
        probe(keep)
    for file in tmp_path.rglob("norm.cls.npy"):
        file.unlink()
    assert probe(keep) == whole


def with_masks(folder: Path, seed: int) -> Path:
    """A folder of images, whose masks are 1 on their left half."""
    draw_images(folder / "images", 1, 6, seed=seed)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 1
    for image in list(folder.rglob("*.png")) + list(folder.rglob("*.jpg")):
        with Image.open(image) as opened:
            Image.fromarray(mask).resize(opened.size, Image.Resampling.NEAREST).save(image.with_suffix(".seg.png"))
    return folder / "images"


def figures(result: object) -> dict[str, float]:
    """All figures of a result, flat."""
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                collect(f"{name}.{key}", one)
        elif isinstance(value, float) and "seconds" not in name:
            found[name] = value

    collect("", vars(result))
    return found


def test_new_files_hold_no_rows(tmp_path: Path) -> None:
    """A process that dies after it made the file of another kind of tokens leaves zeros, which are not features."""
    first = StoredFeatures(tmp_path, ["block"], ["cls"], 5, 3)
    first.rows["block"]["cls"] += 1
    first.advance(5)
    first.save()
    assert StoredFeatures(tmp_path, ["block"], ["cls"], 5, 3).done == 5
    for _ in range(2):
        assert StoredFeatures(tmp_path, ["block", "norm"], ["cls"], 5, 3).done == 0


def test_blocks_of_a_pass_are_bounded_by_the_width_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes have small logits, and features as wide as with a thousand."""
    monkeypatch.setattr(logistic, "_LOGITS_ON_CPU", 64)
    read: list[int] = []

    class Watched(torch.Tensor):
        def split(self, size: int, *more: Any) -> Any:
            read.append(size)
            return super().split(size, *more)

    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(seeded(0)))
    problem = logistic.LogisticProblem(x.as_subclass(Watched), (x[:, 0] > 0).long(), 2)
    read.clear()
    problem.fit(1.0)
    assert set(read) == {4}


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.memory_bytes()
    for text, wanted in (("max\n", whole), ("4096\n", 4096), (f"{2**63 - 4096}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
        assert machine.memory_bytes() == wanted
