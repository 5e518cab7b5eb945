"""The segmentation probe: right on tokens with known answers, and clear about masks that cannot be used."""

import io
import json
import os
import struct
import sys
import tarfile
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded, world_config
from files import saved
from PIL import Image

import cli
from pipeline.config import Config, EvaluateConfig, dump_config, load_config
from pipeline.data import index_beside, index_images
from pipeline.evaluation.dense import nearest, read_maps, same_shape
from pipeline.evaluation.segmentation import VOID, Segmentation, count_pixels, fit_head, read_masks
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_saved
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from pipeline.teachers.teacher import load_teacher
from singer.errors import UserError
from singer.metrics import class_iou, confusion

CPU = torch.device("cpu")
CLASSES, GRID = 4, 6
SHARED = Path(os.environ.get("SINGER_SHARED", Path(__file__).parent.parent.parent / "shared"))
WEIGHTS = SHARED / "teachers" / "vit_tiny_patch16_224_augreg.safetensors"


def colored(folder: Path, count: int, seed: int, void: int = 255) -> None:
    """Frames whose quarters are classes with a color each; the last row of pixels is void, and some have no class 2."""
    rng = np.random.default_rng(seeded(seed))
    colors = np.array([[220, 20, 20], [20, 220, 20], [20, 20, 220], [200, 200, 20]])
    folder.mkdir(parents=True)
    for number in range(count):
        quarters = rng.integers(0, CLASSES - number % 2, (2, 2), dtype=np.uint8)
        labels = quarters.repeat(20, axis=0).repeat(24, axis=1)
        pixels = colors[labels] + rng.integers(-15, 16, (40, 48, 1))
        labels[-1] = void
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(labels).save(folder / f"{number}.seg.png")


@pytest.fixture(scope="session")
def frames(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds train/ and test/ shards with masks."""
    root = tmp_path_factory.mktemp("frames")
    for seed, (split, count) in enumerate({"train": 24, "test": 9}.items()):
        colored(root / "images" / split, count, seed)
        prepare(world_config(world, "prepare.shard_images=10"), root / "images" / split, root / split)
    return root


@pytest.fixture
def settings(world: Path) -> Config:
    return world_config(world, f"evaluate.seg_classes={CLASSES}", "evaluate.tokens=block")


def probe(config: Config, model: Path, train: Path, test: Path) -> Segmentation:
    result = evaluate(config, model, str(train / "*.tar"), str(test / "*.tar"), "segmentation")
    assert isinstance(result, Segmentation)
    return result


def known(noise: float, count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, patches, d) that tell their class, and labels (n, GRID, GRID)."""
    rng = np.random.default_rng(seeded(seed))
    labels = rng.integers(0, CLASSES, (count, GRID, GRID))
    x = np.eye(CLASSES, 8)[labels].reshape(count, -1, 8) + noise * rng.normal(size=(count, GRID**2, 8))
    return torch.from_numpy(x.astype("f4")), torch.from_numpy(labels.astype("i2"))


def miou(x: torch.Tensor, labels: torch.Tensor, test_x: torch.Tensor, test_labels: torch.Tensor) -> float:
    head, _ = fit_head(x, labels, CLASSES, load_config().evaluate, CPU)
    counts = [count_pixels(head, *pair, CLASSES) for pair in zip(test_x, test_labels, strict=True)]
    return float(class_iou(torch.stack(counts).sum(0)).nanmean())


def test_perfect_features_and_chance() -> None:
    train, test = known(0.01), known(0.01, seed=1)
    assert miou(*train, *test) == 1
    x, labels = train
    shuffled = labels.flatten()[torch.randperm(labels.numel())].view_as(labels)
    assert 0.05 < miou(x, shuffled, *test) < 0.25  # guessing gives 1 / (2 · 4 - 1) = 0.14


def test_miou_is_that_of_the_sets() -> None:
    """Against sets of pixels; class 5 is nowhere, class 4 only predicted, and void pixels do not count."""
    rng = np.random.default_rng(seeded(0))
    labels, predicted = rng.integers(-1, 4, (3, 17, 11)), rng.integers(0, 5, (3, 17, 11))
    counts = sum(confusion(torch.from_numpy(p), torch.from_numpy(l), 6) for p, l in zip(predicted, labels, strict=True))
    assert isinstance(counts, torch.Tensor)
    seen = labels != VOID
    assert counts.sum() == seen.sum() and counts.diagonal().sum() == (labels == predicted).sum()
    expected = []
    for c in range(6):
        union = seen & ((labels == c) | (predicted == c))
        expected.append((seen & (labels == c) & (predicted == c)).sum() / union.sum() if union.any() else np.nan)
    np.testing.assert_allclose(class_iou(counts).numpy(), expected, rtol=1e-6)
    assert np.isnan(expected[5]) and expected[4] == 0


def test_void_teaches_nothing() -> None:
    """Tokens under void are dealt to other images: the same statistics, and the same head."""
    x, labels = known(0.5)
    side = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    side[:, :, 7:] = VOID  # upsampling carries the patches from column 4 on no further than this
    dealt = x.view(-1, GRID, GRID, 8).clone()
    dealt[:, :, 4:] = dealt[:, :, 4:].flip(0)
    settings = load_config().evaluate
    head, lr = fit_head(x, side, CLASSES, settings.model_copy(update={"seg_lrs": (1e-2,)}), CPU)
    other, _ = fit_head(dealt.view_as(x), side, CLASSES, settings.model_copy(update={"seg_lrs": (1e-2,)}), CPU)
    assert lr == 1e-2
    torch.testing.assert_close(head.weight, other.weight, atol=1e-4, rtol=1e-3)
    assert head.weight.abs().max() > 0.1
    assert count_pixels(head, x[0], side[0], CLASSES).sum() == 2 * GRID * 7
    nothing, _ = fit_head(x, torch.full_like(side, VOID), CLASSES, settings, CPU)
    assert not nothing.weight.any() and not nothing.bias.any()


def test_labels_are_those_in_the_middle() -> None:
    mask = np.arange(24).reshape(4, 6)
    assert nearest(mask, 2).tolist() == [[7, 10], [19, 22]]
    assert nearest(np.array([[3]]), 2).tolist() == [[3, 3], [3, 3]]


def test_run_from_the_command_line(
    world: Path,
    frames: Path,
    settings: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Twice, to the same figures in one file; colors are easy, and the figures are shares of what counts."""
    distill(settings, world / "cache", tmp_path / "run", world / "adapters")
    (tmp_path / "config.yaml").write_text(dump_config(settings))
    command = ["evaluate", tmp_path / "run", "--task", "segmentation", "--config", tmp_path / "config.yaml", "--json"]
    args = [*command, "--train", frames / "train" / "*.tar", "--test", frames / "test" / "*.tar"]
    results = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["singer", *map(str, args)])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        results.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
        results[-1].pop("seconds")
    first, second = results
    assert first == second
    assert (first["train_images"], first["test_images"], first["classes"]) == (24, 9, CLASSES)
    assert 40 < first["miou"] <= 100 and first["pixel_accuracy"] > 60
    assert first["miou"] == pytest.approx(np.mean(first["class_iou"]), rel=1e-5)
    (file,) = (tmp_path / "run").glob("evaluate-*.json")
    stored = json.loads(file.read_text())
    assert first["written"] == str(file) and stored["miou"] == first["miou"] and stored["task"] == "segmentation"
    assert stored["test"] == ["test-000000.tar"]


def test_tokens_size_and_seed_are_respected(world: Path, frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the head learns from: figures of two heads may be the same."""
    teacher, shards = world / "teacher", (frames / "train", frames / "test")
    learnt: list[tuple[torch.Tensor, int]] = []

    def watched(x: torch.Tensor, labels: torch.Tensor, classes: int, settings: EvaluateConfig, device: Any) -> Any:
        learnt.append((x.clone(), settings.seed))
        return fit_head(x, labels, classes, settings, device)

    monkeypatch.setattr("pipeline.evaluation.segmentation.fit_head", watched)
    sets = [f"evaluate.seg_classes={CLASSES}", "evaluate.seg_lrs=[1e-3,1e-2]", "evaluate.seg_passes=20"]
    plain = probe(world_config(world, *sets), teacher, *shards)
    assert plain.written is None
    (block, _), (norm, _) = learnt
    assert not torch.equal(block, norm)
    with torch.inference_mode():
        torch.testing.assert_close(norm, load_saved(teacher).model.norm(block))
    found = {}
    wide = "image_size=[32,48]"
    for other in ("tokens=norm", wide, "seed=1"):
        changed = world_config(world, *sets, "evaluate.tokens=block", f"evaluate.{other}")
        learnt.clear()
        found[other] = probe(changed, teacher, *shards)
        ((x, seed),) = learnt
        assert x.shape == (24, 24 if other == wide else 16, 24)
        if other != wide:
            torch.testing.assert_close(x, norm if other == "tokens=norm" else block, atol=1e-4, rtol=1e-4)
        assert seed == (1 if other == "seed=1" else seeded(0))
    normed = found["tokens=norm"]
    assert plain.normed == {k: getattr(normed, k) for k in ("miou", "pixel_accuracy", "class_iou", "lr")}


def test_the_heads_seed_decides() -> None:
    weights = []
    for seed in (0, 0, 1):
        settings = load_config(sets=[f"evaluate.seed={seed}", "evaluate.seg_lrs=[0.01]", "evaluate.seg_passes=2"])
        weights.append(fit_head(*known(0.5), CLASSES, settings.evaluate, CPU)[0].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_ignored_label_and_absent_classes(world: Path, frames: Path) -> None:
    """Without a void label the last row counts; a class that is nowhere has no figure and does not lower the mean."""
    shards = frames / "train", frames / "test"
    config = world_config(world, "evaluate.seg_classes=9", "evaluate.seg_lrs=[0.01]")
    result = probe(config, world / "teacher", *shards)
    present = [share for share in result.class_iou if share is not None]
    assert result.class_iou[CLASSES:] == [None] * 5 and result.miou == pytest.approx(np.mean(present), rel=1e-5)
    with pytest.raises(UserError, match=r"has label 255, but evaluate\.seg_classes=9 allows 0 to 8 besides"):
        probe(world_config(world, "evaluate.seg_classes=9", "evaluate.seg_ignore=9"), world / "teacher", *shards)


@pytest.mark.parametrize(
    ("mask", "image", "fits"),
    [
        ((320, 240), (640, 480), True),
        ((1280, 960), (640, 480), True),
        ((213, 160), (640, 480), True),  # rounded
        ((240, 320), (640, 480), False),  # turned
        ((640, 478), (640, 480), False),
        ((640, 479), (640, 480), True),
        ((320, 320), (640, 480), False),
        ((500, 3), (1000, 5), True),
    ],
)
def test_shapes_that_fit(mask: tuple[int, int], image: tuple[int, int], fits: bool) -> None:
    assert same_shape(mask, image) == same_shape(image, mask) == fits


def test_masks_of_another_resolution(tmp_path: Path) -> None:
    """Each is read in full, and images that EXIF turns are compared as they are seen."""
    rows = np.arange(6, dtype=np.uint8)[:, None].repeat(4, 1)
    tags = Image.Exif()
    tags[274] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64)).save(buffer, "PNG", exif=tags)  # 64 x 96 when upright
    half = np.zeros((4, 4), np.uint8)
    folder = packed(tmp_path / "x", {"seg_png": png(half)}, seg_png=png(half + 1))
    shard = packed(
        tmp_path / "y", {"png": buffer.getvalue(), "seg_png": png(rows)}, png=buffer.getvalue(), seg_png=png(rows)
    )
    settings = load_config(sets=["evaluate.seg_classes=6"]).evaluate
    for place, shape in ((folder, (4, 4)), (shard, (6, 4))):
        images = index_images(str(place / "x.tar"))
        masks = list(read_masks(images, index_beside(images, "seg.png"), settings))
        assert len(masks) == 3 and {mask.shape for mask in masks} == {shape}
    assert masks[0][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def packed(folder: Path, good: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A shard of two good samples and one, `odd`, with these members (name: its extension, _ for a dot).

    good: what is beside the images of good samples; default: masks.
    """
    good = {"png": png(np.zeros((8, 8, 3), np.uint8)), **(good or {"seg_png": png(np.zeros((8, 8), np.uint8))})}
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in (("a", good), ("b", good), ("odd", {"png": good["png"], **members})):
            for extension, data in sample.items():
                entry = tarfile.TarInfo(f"{key}.{extension.replace('_', '.')}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return folder


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(pixels)
    return saved(image.convert(mode) if mode else image)


def grey4() -> bytes:
    """A PNG of 8 x 8 pixels with 4-bit greys, which PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 4, 0, 0, 0, 0)
    rows = zlib.compress(b"\0\x11\x11\x11\x11" * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


ZEROS = np.zeros((8, 8), np.uint8)
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "missing": ({}, r"x\.tar: sample 'odd' has no \.seg\.png; every image needs one"),
    "empty": ({"seg_png": b""}, r"x\.tar: sample 'odd' has a \.seg\.png that is empty"),
    "broken": ({"seg_png": png(ZEROS)[:44]}, r"mask 'odd' in .*x\.tar cannot be decoded"),
    "other size": ({"seg_png": png(ZEROS[:5])}, r"mask 'odd' in .*x\.tar has 8 x 5 pixels, but its image has 8 x 8"),
    "out of range": ({"seg_png": png(ZEROS + 4)}, r"mask 'odd' in .*x\.tar has label 4, .*seg_classes=4 allows 0 to 3"),
    "color": ({"seg_png": png(ZEROS, "RGB")}, r"mask 'odd' in .*x\.tar holds no class numbers"),
    "few bits": ({"seg_png": grey4()}, r"mask 'odd' in .*x\.tar holds no class numbers"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_masks_are_named(
    name: str, split: str, world: Path, frames: Path, settings: Config, tmp_path: Path
) -> None:
    members, message = BAD[name]
    places = {"train": frames / "train", "test": frames / "test", split: packed(tmp_path / "bad", **members)}
    with pytest.raises(UserError, match=message):
        probe(settings, world / "teacher", places["train"], places["test"])


def test_a_mask_that_is_not_turned_as_its_image_is_named(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=tags)
    (tmp_path / "a.seg.png").write_bytes(png(ZEROS[:4]))
    images = index_images(str(tmp_path))
    maps = read_maps(images, index_beside(images, "seg.png"), "mask", lambda image, *_: np.asarray(image), 1)
    with pytest.raises(UserError, match=r"8 x 4 pixels, but its image has 4 x 8; .*; images are turned as their EXIF"):
        next(maps)


def test_masks_with_a_palette_are_indices(world: Path, frames: Path, settings: Config, tmp_path: Path) -> None:
    palette = Image.fromarray(ZEROS + 3)
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 50, 60, 70, 200, 100, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    result = probe(settings, world / "teacher", frames / "train", packed(tmp_path / "p", seg_png=buffer.getvalue()))
    assert result.class_iou[3] is not None


def test_settings_that_cannot_be(
    world: Path, frames: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("pipeline.stages.evaluate"), "open_model", None)  # they are told before
    shards = frames / "train", frames / "test"
    with pytest.raises(UserError, match=r"needs evaluate\.seg_classes, the number of classes"):
        probe(config, world / "teacher", *shards)
    void = packed(tmp_path / "void", seg_png=png(ZEROS))
    ignored = world_config(world, "evaluate.seg_classes=2", "evaluate.seg_ignore=0")
    with pytest.raises(UserError, match=r"--test: no mask has a label besides evaluate\.seg_ignore=0"):
        probe(ignored, world / "teacher", void, void)
    x, labels = known(0.1, count=1)
    with pytest.raises(UserError, match="--train has one image only"):
        fit_head(x, labels, CLASSES, config.evaluate, CPU)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"no real teacher at {WEIGHTS}")
def test_real_frames(tmp_path: Path) -> None:
    """CamVid at 128 pixels: 33.0 % mIoU, 74.2 % of the pixels."""
    sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={WEIGHTS}", "teacher.image_size=128"]
    config = load_config(sets=[*sets, "evaluate.seg_classes=11", "evaluate.seg_ignore=11"])
    teacher = load_teacher(config.teacher)
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    train, test = (str(SHARED / "datasets" / f"camvid-{split}-*.tar") for split in ("train", "test"))
    result = evaluate(config, tmp_path / "teacher", train, test, "segmentation")
    assert isinstance(result, Segmentation) and (result.train_images, result.test_images) == (184, 117)
    assert result.miou == pytest.approx(33.0, abs=1) and result.pixel_accuracy == pytest.approx(74.2, abs=1)
