"""Which images are trained on: scores against NumPy, and the share that they choose."""

import json
import shutil
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import run_singer, seeded, world_config

from pipeline.cache import Cache
from pipeline.config import Config, dump_config, load_config
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.distilling.image_scores import image_scores, prototype_distance
from pipeline.training.distilling.student_scores import StudentScores
from pipeline.training.distilling.subset import split_images
from pipeline.training.refining.stored_refiners import load_refiner
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
    monkeypatch.setattr("pipeline.training.distilling.image_scores._IMAGES_OF_A_CLUSTER", 50)
    monkeypatch.setattr("pipeline.training.distilling.image_scores.batches", lambda *_: iter([{3: planted[:, None]}]))
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


def pairs_config(world: Path, *sets: str) -> Config:
    views = ("views.count=2", "views.kind=random-resized-crop")
    return world_config(world, *views, "refine.cleaner=neighbour", "distill.epochs=1", "distill.batch_size=4", *sets)


@pytest.fixture(scope="module")
def pairs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two views of each of ten images, its refiner, and a run on three of the images; tests only read it."""
    root = tmp_path_factory.mktemp("pairs")
    config = pairs_config(world, "distill.share=0.3")
    cache_teacher(config, str(sorted((world / "test").glob("*.tar"))[-1]), root / "cache")
    refine(config, root / "cache", root / "refiner")
    distill(config, root / "cache", root / "run", root / "refiner")
    return root


@torch.no_grad()
def test_loss_of_a_student(pairs: Path) -> None:
    """By hand from the stored weights, of the first view of one image at a time."""
    cache, run = Cache(pairs / "cache"), pairs / "run"
    refiner = load_refiner(pairs / "refiner", cache)
    student = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True).eval()
    heads = safetensors.torch.load_file(run / "projectors.safetensors")
    matching = {int(b): s for b, s in json.loads((run / "run.json").read_text())["teachers"][0]["matching"].items()}
    mean, std = (torch.tensor(student.pretrained_cfg[name]) for name in ("mean", "std"))
    expected = []
    with open_images(cache) as files:
        for image in range(10):
            record = int(np.flatnonzero(cache.index.image == image)[0])
            pixels = ((cache.pixels([record], 32, files) / 255 - mean) / std).permute(0, 3, 1, 2)
            errors = []
            for b, x in cache.features([record], CPU).items():
                ((patches, cls),) = student.forward_intermediates(
                    pixels, [matching[b]], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
                )
                projected = torch.cat([cls, patches], 1) @ heads[f"{b}.weight"].T + heads[f"{b}.bias"]
                errors.append((projected - refiner.normaliser(b)(refiner.clean(x, b))).square().mean())
            expected.append(float(torch.stack(errors).mean()))
    found = StudentScores(run, cache, CPU).of_images(None, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len({*found}) == 10


def test_the_loss_chooses_the_share(
    world: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All views of the hardest or easiest images, for a student with other blocks and without a refiner, too."""
    cache = Cache(pairs / "cache", blocks=[3])
    order = np.argsort(StudentScores(pairs / "run", cache, CPU).of_images(None, 1))
    sets = ["distill.share=0.3", "distill.share_by=loss", f"distill.share_run={pairs / 'run'}"]
    for keep, wanted in (("hard", order[-3:]), ("easy", order[:3])):
        config = pairs_config(world, *sets, f"distill.share_keep={keep}", "distill.blocks=[3]")
        records, _ = split_images(cache, config.distill)
        assert records is not None and len(records) == 6 and {*cache.index.image[records]} == {*wanted.tolist()}
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    command = ["distill", "--config", file, "--cache", pairs / "cache", "--out", tmp_path / "out"]
    assert run_singer(monkeypatch, *command) == 0
    assert "which was trained on 30 % of them" in capfd.readouterr().err
    assert json.loads((tmp_path / "out/run.json").read_text())["steps"] == 2
    assert run_singer(monkeypatch, *command, "--resume") == 0
    # A run is another one, too, if it was trained anew at the same place.
    inputs = tmp_path / "out/inputs.json"
    inputs.write_text(json.dumps(json.loads(inputs.read_text()) | {"distill.share_run": "another"}))
    assert run_singer(monkeypatch, *command, "--resume") == 2
    assert "was started with another distill.share_run" in capfd.readouterr().err
    assert run_singer(monkeypatch, *command, "--resume", "--set", "distill.share_run=nowhere") == 2
    assert "nowhere does not exist" in capfd.readouterr().err


TUNED = ("classes", "images", "steps", "loss", "seconds", "images_per_second", "data_wait_percent")
# What is changed in a file of the run, and what is then said.
REFUSED: dict[str, tuple[str, str, object, str]] = {
    "other cache": ("run.json", "teachers.0.cache", "0" * 64, "learned from cache 000000000000, but .*cache is"),
    "several caches": ("run.json", "teachers.1", None, "learned from several caches"),
    "fine-tuned": ("run.json", "finetuned", dict.fromkeys(TUNED, 1) | {"sources": []}, "was fine-tuned with labels"),
    "no refiner": (
        "run.json",
        "teachers.0.refiner_kind",
        {"cleaner": "clip", "normaliser": "none"},
        "the refiner that .* is not at",
    ),
    "other blocks": (
        "run.json",
        "teachers.0.matching",
        {"3": 2},
        "projectors.safetensors does not fit the cache: it has other",
    ),
    "joint": ("config.yaml", "distill.joint", True, "trained its targets too"),
    "objective": ("config.yaml", "distill.objective", {"mse": 1, "queue": 1}, "objective queue of .* has no loss of"),
    "own module": ("config.yaml", "student.name", "mine:make", "is a module of your own"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_runs_that_score_no_images(pairs: Path, tmp_path: Path, what: str) -> None:
    name, key, value, message = REFUSED[what]
    run = tmp_path / "run"
    shutil.copytree(pairs / "run", run)
    tree = yaml.safe_load((run / name).read_text())
    if key == "teachers.1":
        tree["teachers"] *= 2
    else:
        *sections, last = (int(part) if part.isdigit() else part for part in key.split("."))
        reduce(getitem, sections, tree)[last] = value
    (run / name).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"^distill\.share_run: .*{message}"):
        StudentScores(run, Cache(pairs / "cache"), CPU)
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"is not a finished run: it has no run\.json"):
        StudentScores(run, Cache(pairs / "cache"), CPU)


def test_the_loss_and_its_run_belong_together() -> None:
    with pytest.raises(UserError, match=r"distill\.share_by: loss is that of a trained student; give its run"):
        load_config(None, ["distill.share=0.5", "distill.share_by=loss"])
    with pytest.raises(UserError, match=r"distill\.share_run: el2n needs no run"):
        load_config(None, ["distill.share=0.5", "distill.share_by=el2n", "distill.share_run=x"])
