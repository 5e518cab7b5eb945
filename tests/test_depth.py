"""The depth probe: right on tokens with known answers, and clear about depth maps that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded, world_config
from PIL import Image
from test_segmentation import SHARED, WEIGHTS, packed, png

from pipeline.config import Config, load_config
from pipeline.data import index_beside, index_images
from pipeline.evaluation.dense import HeadSpec, fit_head
from pipeline.evaluation.depth import Depth, fit_heads, read_depths
from pipeline.models.backbone import save_backbone
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from pipeline.teachers.teacher import load_teacher
from singer.errors import UserError
from singer.metrics import depth_figures, depth_sums

CPU = torch.device("cpu")
GRID = 6
QUICK = ["evaluate.depth_bins=32", "evaluate.depth_lrs=[0.01,0.03]", "evaluate.depth_passes=25"]


def stepped(folder: Path, count: int, seed: int) -> None:
    """Frames whose quarters are nearer the brighter they are; a row of pixels is missing, another far beyond 10 m."""
    rng = np.random.default_rng(seeded(seed))
    folder.mkdir(parents=True)
    for number in range(count):
        near = rng.integers(0, 5, (2, 2)).repeat(20, axis=0).repeat(24, axis=1)
        pixels = 20 + 50 * near[..., None] + rng.integers(-15, 16, (40, 48, 3))
        depth = (6000 - 1000 * near).astype(np.uint16)
        depth[-1], depth[0] = 0, 50000
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(depth).save(folder / f"{number}.depth.png")


@pytest.fixture(scope="session")
def rooms(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds train/ and test/ shards with depth maps."""
    root = tmp_path_factory.mktemp("rooms")
    for seed, (split, count) in enumerate({"train": 24, "test": 9}.items()):
        stepped(root / "images" / split, count, seed)
        prepare(world_config(world), root / "images" / split, root / split)
    return root


def probe(config: Config, model: Path, train: Path, test: Path) -> Depth:
    result = evaluate(config, model, str(train / "*.tar"), str(test / "*.tar"), "depth")
    assert isinstance(result, Depth)
    return result


def known(count: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, patches, d) that tell their depth, smooth over the frame, and depths (n, GRID, GRID)."""
    rng = np.random.default_rng(seeded(seed))
    slope, middle = rng.uniform(-1, 1, (count, 1, 1)), rng.uniform(2, 6, (count, 1, 1))
    depth = middle + slope * np.linspace(-1, 1, GRID)[None, :, None] + np.zeros((1, 1, GRID))
    kinds = np.exp(-(((depth[..., None] - np.arange(8)) / 0.7) ** 2))
    x = kinds.reshape(count, -1, 8) + 0.001 * rng.normal(size=(count, GRID**2, 8))
    return torch.from_numpy(x.astype("f4")), torch.from_numpy(depth.astype("f4"))


def figures(
    x: torch.Tensor, depth: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, dict[str, float]]:
    sets = ["evaluate.depth_bins=64", "evaluate.depth_lrs=[0.003,0.01]"]
    heads = fit_heads(x, depth, load_config(sets=sets).evaluate, CPU)
    return {
        name: depth_figures(
            torch.stack([depth_sums(predict(a, (GRID, GRID)), d) for a, d in zip(*test, strict=True)]).sum(0)
        )
        for name, (predict, _) in heads.items()
    }


def test_perfect_features_and_chance() -> None:
    """Depths dealt to other images teach the mean, whose error is their deviation."""
    test = known(seed=1)
    x, depth = known()
    for name, found in figures(x, depth, test).items():
        assert found["rmse"] < 0.25 and found["delta1"] > 0.99, name
    deviation = float(test[1].std())
    dealt = depth.flatten()[torch.randperm(depth.numel())].view_as(depth)
    for name, found in figures(x, dealt, test).items():
        assert found["rmse"] == pytest.approx(deviation, rel=0.15), name


def test_a_rate_at_which_a_head_diverges_is_not_chosen() -> None:
    """Its score is not a number."""
    scores = iter([0.5, float("nan"), 0.7])
    spec = HeadSpec("depth", 1, lambda maps, target: maps.sum(), lambda *_: next(scores), (0.01, 0.02, 0.03), 1, 0)
    assert fit_head(*known(4), spec, CPU)[1] == 0.03


def test_missing_pixels_teach_nothing() -> None:
    x, depth = known()
    depth[:, :2] = 0
    other = x.clone().view(-1, GRID, GRID, 8)
    other[:, :1] = other[:, :1].flip(0)  # whole rows: the same statistics, and out of reach of what counts
    settings = load_config(sets=["evaluate.depth_lrs=[0.01]", "evaluate.depth_passes=5"]).evaluate
    a, b = (fit_heads(tokens, depth, settings, CPU) for tokens in (x, other.view_as(x)))
    for name in ("bins", "regression"):
        assert a[name][1] == 0.01
        torch.testing.assert_close(a[name][0](x[0], (9, 7)), b[name][0](x[0], (9, 7)), atol=1e-4, rtol=1e-4)
        assert a[name][0](x[0], (9, 7)).shape == (9, 7)


def test_run_is_probed_and_the_result_kept(world: Path, rooms: Path, tmp_path: Path) -> None:
    config = world_config(world, *QUICK)
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    shards = rooms / "train", rooms / "test"
    result = probe(config, tmp_path / "run", *shards)
    assert (result.train_images, result.test_images, result.pixels) == (24, 9, 9 * 38 * 48)
    for head in (result.bins, result.regression):
        assert set(head) == {"rmse", "abs_rel", "delta1", "lr"} and head["lr"] in (0.01, 0.03)
        assert head["rmse"] < 1.2  # brightness is easy; the deviation of the depths is 1.4 m
    assert result.written is not None
    stored = json.loads(result.written.read_text())
    assert stored["bins"] == result.bins and stored["task"] == "depth"
    again = probe(world_config(world, *QUICK, "evaluate.tokens=norm"), tmp_path / "run", *shards)
    assert result.normed == {"bins": again.bins, "regression": again.regression} == stored["normed"]
    assert again.normed is None and again.written != result.written


def test_range_and_units(tmp_path: Path) -> None:
    """Millimeters become meters; both ends of the range count."""
    depth = np.full((8, 8), 2500, np.uint16)
    depth[0, :5] = [0, 1, 10000, 10001, 65535]
    images = index_images(str(packed(tmp_path / "x", {"depth_png": png(depth)}, depth_png=png(depth)) / "*.tar"))
    maps = list(read_depths(images, index_beside(images, "depth.png"), load_config().evaluate))
    assert len(maps) == 3 and maps[0].dtype == np.float32
    assert maps[0][0].tolist() == [0, np.float32(0.001), 10, 0, 0, 2.5, 2.5, 2.5]


METERS = np.full((8, 8), 3000, np.uint16)
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "missing": ({}, r"x\.tar: sample 'odd' has no \.depth\.png; every image needs one"),
    "broken": ({"depth_png": png(METERS)[:44]}, r"depth map 'odd' in .*x\.tar cannot be decoded"),
    "other size": (
        {"depth_png": png(METERS[:5])},
        r"depth map 'odd' in .*x\.tar has 8 x 5 pixels, but its image has 8 x 8",
    ),
    "eight bits": ({"depth_png": png(np.ones((8, 8), np.uint8))}, r"'odd' in .*x\.tar holds no millimeters; store it"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_maps_are_named(name: str, split: str, world: Path, rooms: Path, tmp_path: Path) -> None:
    members, message = BAD[name]
    bad = packed(tmp_path / "bad", good={"depth_png": png(METERS)}, **members)
    places = {"train": rooms / "train", "test": rooms / "test", split: bad}
    with pytest.raises(UserError, match=message):
        probe(world_config(world, *QUICK), world / "teacher", places["train"], places["test"])


def test_settings_that_cannot_be(world: Path, rooms: Path) -> None:
    shards = rooms / "train", rooms / "test"
    near = world_config(world, "evaluate.depth_max=1.5")
    with pytest.raises(
        UserError, match=r"--train: no depth map has a value from evaluate\.depth_min=0\.001 to depth_max"
    ):
        probe(near, world / "teacher", *shards)
    with pytest.raises(UserError, match=r"depth_min: 20\.0 is not below depth_max, 10\.0"):
        world_config(world, "evaluate.depth_min=20")
    x, depth = known(count=1)
    with pytest.raises(UserError, match=r"--train has one image only; .* evaluate\.depth_lrs"):
        fit_heads(x, depth, load_config().evaluate, CPU)
    with pytest.raises(UserError, match="this task learns from images; give --train"):
        evaluate(world_config(world), world / "teacher", None, str(rooms / "test" / "*.tar"), "depth")


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no real teacher at {WEIGHTS}")
def test_real_frames(tmp_path: Path) -> None:
    """12 frames, which are also those that it learns from: too few for a figure, enough to see that depth is learnt."""
    sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={WEIGHTS}", "teacher.image_size=128"]
    config = load_config(sets=sets)
    teacher = load_teacher(config.teacher)
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    shards = SHARED / "datasets" / "rgbd-sample-0000.tar"
    result = evaluate(config, tmp_path / "teacher", str(shards), str(shards), "depth")
    assert isinstance(result, Depth) and result.test_images == 12 and 0 < result.pixels < 12 * 640 * 480
    for head in (result.bins, result.regression):
        assert 0 < head["rmse"] < 3 and 0.2 < head["delta1"] < 1


def test_maps_of_half_the_resolution(world: Path, tmp_path: Path) -> None:
    """Figures are over the pixels of the maps, not over those of the images (8 x 8)."""
    half = png(np.full((4, 4), 3000, np.uint16))
    place = packed(tmp_path / "x", good={"depth_png": half}, depth_png=half)
    assert probe(world_config(world, *QUICK), world / "teacher", place, place).pixels == 3 * 16
