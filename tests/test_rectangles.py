"""Images that are not square: the whole chain at 32 x 48 pixels, and what is said where a model cannot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import config_with, make_vit, run_singer, seeded, world_config
from PIL import Image
from test_export import run_snippet

from pipeline.cache.info import cache_info
from pipeline.cache.reader import Cache
from pipeline.config import Config, ViewsConfig, load_config
from pipeline.data.views import apply_view, crop_view, draw_view, normalise
from pipeline.evaluation import depth as depth_probe
from pipeline.evaluation import segmentation
from pipeline.evaluation.dense import LinearHead, nearest
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.loading import create_model, load_saved
from pipeline.planning.plan import plan
from pipeline.reports.scores import Probe
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.embed import embed
from pipeline.stages.evaluate import evaluate
from pipeline.stages.export import export
from pipeline.stages.inspect import inspect
from pipeline.stages.refine import refine
from pipeline.stages.report import report
from pipeline.students.export_formats import Student
from pipeline.teachers.teacher import load_teacher
from pipeline.training.distilling.cached_teachers import open_images
from singer import Description
from singer.backbones import block_outputs
from singer.described import as_backbone
from singer.errors import UserError
from singer.selection import select_weights
from singer.sizes import Size
from singer.suffix import TeacherSuffix, find_suffix

SIZE = (32, 48)
CPU = torch.device("cpu")


def wide_config(world: Path, *sets: str) -> Config:
    size = f"teacher.image_size=[{SIZE[0]},{SIZE[1]}]"
    return world_config(world, size, "refine.cleaner=neighbour", "distill.epochs=1", *sets)


@pytest.fixture(scope="module")
def shards(world: Path) -> str:
    return str(world / "test" / "*.tar")


@pytest.fixture(scope="module")
def wide(world: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a cache of the world's teacher at 32 x 48 pixels, a refiner that reads neighbours, and a run."""
    root, config = tmp_path_factory.mktemp("wide"), wide_config(world, "views.pixels=uint8")
    cache_teacher(config, shards, root / "cache")
    refine(config, root / "cache", root / "refiner")
    distill(config, root / "cache", root / "run", root / "refiner")
    return root


def pictures(count: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seeded(1)))


def assert_live(cache: Cache, teacher: Backbone, count: int = 8) -> None:
    """The cached features are those that the model computes of the cached views."""
    manifest = cache.manifest.teacher
    with open_images(cache) as files:
        pixels = cache.pixels(np.arange(count), manifest.image_size, files)
    assert pixels.shape == (count, *SIZE, 3)
    with torch.no_grad():
        live = block_outputs(teacher.model, normalise(pixels, manifest.mean, manifest.std), cache.blocks)
    for block, x in cache.features(np.arange(count), CPU).items():
        rows, columns = manifest.grid_of(block)
        assert x.shape[1] == manifest.prefix_tokens + rows * columns and 2 * columns == 3 * rows
        torch.testing.assert_close(x, live[block], rtol=1e-3, atol=1e-3)


def test_cached_features_are_the_live_models(world: Path, wide: Path) -> None:
    config, cache = wide_config(world), Cache(wide / "cache")
    teacher = cache.manifest.teacher
    assert (teacher.image_size, teacher.grid, cache.manifest.views["shape"]) == (SIZE, (4, 6), [2, 3])
    assert cache.manifest.pixels is not None and cache.manifest.pixels.size == SIZE
    assert_live(cache, load_teacher(config.teacher))
    assert json.loads((wide / "cache" / "manifest.json").read_bytes())["teacher"]["image_size"] == list(SIZE)


def test_student_of_rectangles(world: Path, wide: Path, shards: str, tmp_path: Path) -> None:
    """Its probes, its dense features and its export for timm, which others read."""
    config, out = wide_config(world), wide / "run"
    student = load_saved(out / "student")
    assert (student.image_size, student.grid) == (SIZE, (4, 6))
    assert evaluate(config, out, shards, shards).linear["cls"]["top1"] > 50
    assert embed(config, out, shards, tmp_path / "x.npy", "dense").shape == (4, 6, 12)
    assert export(config, out, tmp_path / "timm", "timm").max_difference < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(pictures(2)), student.model(pictures(2)))
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, *SIZE)
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "| 8, 32x48 pixels |" in card and "crop of this shape, bicubic to 32x48 pixels" in card
    preprocess = Student(student, student.model, "pooled")
    assert preprocess.preprocess["size"] == SIZE and preprocess.preprocess["crop"] == "center"
    assert 'tuple(p["size"][::-1])' in preprocess.pixels
    # At another size, the positions are interpolated from their own grid, not from a square of as many.
    for size in ((64, 96), 48):
        larger = load_saved(out / "student", size)
        grid = Size.of(size).grid(8)
        assert (larger.image_size, larger.grid) == (size, grid)
        old, new = (m.model.pos_embed[:, 1:].unflatten(1, m.grid) for m in (student, larger))
        assert torch.nn.functional.cosine_similarity(old[0, 0, 0], new[0, 0, 0], 0) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "onnx", "torch-export"])
def test_other_exports(world: Path, wide: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives what the student gives, and the card's code makes its input of any image."""
    assert export(wide_config(world), wide / "run", tmp_path / to, to).max_difference < 1e-4
    Image.new("RGB", (70, 30), "red").save(tmp_path / to / "image.png")
    names = run_snippet(tmp_path / to, monkeypatch)
    assert torch.as_tensor(names["images"]).shape == (1, 3, *SIZE)


@pytest.mark.slow
def test_pages(world: Path, wide: Path, tmp_path: Path) -> None:
    report([wide / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "aspect-ratio: 48 / 32;" in page and "32x48 px, 4 × 6 patches" in page
    inspect(wide_config(world), wide / "cache", wide / "refiner", tmp_path / "inspect")
    assert (tmp_path / "inspect" / "inspect.html").is_file()


@pytest.mark.slow
def test_plan(world: Path, shards: str) -> None:
    """A record has as many bytes as its 25 tokens need."""
    found = plan(wide_config(world, "cache.codec=float16"), shards, None, 0)
    option = next(o for o in found.options if (o.codec, o.token_share) == ("float16", 1.0))
    assert option.bytes_per_image == pytest.approx(2 * 2 * 25 * 24, rel=0.1)


def test_stages_of_a_hierarchical_teacher(world: Path, shards: str, tmp_path: Path) -> None:
    """Every stage has a grid of its own, of 2 to 3; the student is another such model."""
    torch.manual_seed(seeded(0))
    args = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "num_classes": 0}
    teacher = create_model("convnext_atto", SIZE, args, None, False, "model")
    teacher.model.eval()
    save_backbone(teacher, teacher.model.state_dict(), tmp_path / "teacher")
    config = config_with(f"teacher.name=local-dir:{tmp_path / 'teacher'}", "teacher.image_size=[32,48]",
                         "cache.blocks=[0,1]", "refine.cleaner=neighbour", "distill.epochs=1")  # fmt: skip
    cache_teacher(config, shards, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert [cache.manifest.teacher.grid_of(b) for b in (0, 1, 2)] == [(8, 12), (4, 6), (2, 3)]
    assert_live(cache, teacher)
    refine(config, tmp_path / "cache", tmp_path / "refiner")
    run = distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner")
    assert np.isfinite(run.loss) and load_saved(tmp_path / "run" / "student").grid == (4, 6)


def test_probes_of_pixels_know_the_grid(world: Path) -> None:
    """A head that reads one channel draws it where it is in the image."""
    grid = (2, 3)
    tokens = torch.arange(6.0)[None, :, None]
    head = LinearHead(torch.zeros(1), torch.ones(1), torch.ones(1, 1), torch.zeros(1), grid)
    torch.testing.assert_close(head.maps(tokens, grid)[0, 0], torch.arange(6.0).view(grid))
    assert nearest(np.arange(24).reshape(4, 6), grid).tolist() == [[7, 9, 11], [19, 21, 23]]


def test_heads_learn_on_the_grid() -> None:
    """Tokens tell their class, or their depth, on a grid of 2 x 5: as many as no square has."""
    random = torch.Generator().manual_seed(seeded(0))
    labels = torch.randint(0, 3, (20, 2, 5), generator=random)
    x = torch.nn.functional.one_hot(labels.flatten(1), 3) + 0.1 * torch.randn(20, 10, 3, generator=random)
    finer = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    sets = ["evaluate.seg_lrs=[0.1]", "evaluate.depth_lrs=[0.1]"]
    settings = load_config(sets=[*sets, "evaluate.seg_passes=20", "evaluate.depth_passes=20"]).evaluate
    head, _ = segmentation.fit_head(x, finer, 3, settings, CPU)
    assert torch.equal(head.maps(x, (2, 5)).argmax(1), labels)
    predict, _ = depth_probe.fit_heads(x, 1.0 + finer, settings, CPU)["regression"]
    found = torch.stack([predict(one, (4, 10)) for one in x])
    assert (found - 1.0 - finer).abs().mean() < 0.5


def test_crops_have_the_shape_of_the_input() -> None:
    """Of an image of 60 x 30 pixels (width x height), a square takes half and 1 : 2 all."""
    image = Image.fromarray(np.random.default_rng(seeded(0)).integers(0, 255, (30, 60, 3), dtype=np.uint8))
    assert crop_view(1.0, image.size).box == (0.25, 0.0, 0.75, 1.0)
    assert crop_view(1.0, image.size, (224, 448)).box == (0.0, 0.0, 1.0, 1.0)
    assert crop_view(0.5, image.size, (2, 1)).box == pytest.approx((26 / 60, 7 / 30, 34 / 60, 22 / 30))
    np.testing.assert_array_equal(apply_view(image, crop_view(1.0, image.size, (1, 2)), (30, 60)), np.asarray(image))
    config = ViewsConfig(kind="random-resized-crop", scale=(0.1, 0.1), ratio=(1.0, 1.0), shape=(1, 2))
    for number in range(20):
        left, upper, right, lower = draw_view(config, "key", number, image.size).box
        assert (right - left) * 60 == pytest.approx(2 * (lower - upper) * 30, rel=1e-5)


def test_within() -> None:
    """The longer side is given."""
    assert (Size(32, 48).within(24), Size(48, 32).within(24)) == ((16, 24), (24, 16))


@pytest.mark.parametrize(
    ("given", "read"), [("224", 224), ("[224,448]", (224, 448)), ("224x448", (224, 448)), ("[32,32]", 32)]
)
def test_sizes_as_they_are_written(given: str, read: object) -> None:
    """A square is one number in either form, so that equal sizes are equal in files."""
    for key in ("teacher.image_size", "student.image_size", "evaluate.image_size", "views.pixel_size"):
        section, name = key.split(".")
        config = load_config(sets=[f"{key}={given}"])
        assert getattr(getattr(config, section), name) == read
        assert load_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("given", ["[224]", "[1,2,3]", "wide", "224x", "[0,32]", "0"])
def test_sizes_that_are_none(given: str) -> None:
    with pytest.raises(UserError, match=r"configuration: teacher\.image_size: input should be"):
        load_config(sets=[f"teacher.image_size={given}"])


def test_the_command_line_takes_both_numbers(
    world: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"local-dir:{world / 'teacher'}"
    command = ["cache-teacher", "--images", shards, "--teacher", name, "--blocks", "3", "--out", tmp_path / "cache"]
    assert run_singer(monkeypatch, *command, "--image-size", "32x48") == 0
    assert Cache(tmp_path / "cache").manifest.teacher.image_size == SIZE
    assert run_singer(monkeypatch, *command, "--overwrite", "--image-size", "32x44") == 2


def test_another_teacher_gets_the_same_crops(world: Path, wide: Path, shards: str, tmp_path: Path) -> None:
    """A teacher of squares joins a cache only if it is told to see crops of the cache's shape."""
    shutil.copytree(wide / "cache", tmp_path / "cache")
    with pytest.raises(UserError, match=r"its views\.shape is \[2, 3\], this run has \[1, 1\]"):
        cache_teacher(world_config(world, "cache.blocks=[3]"), shards, tmp_path / "cache", mode="append")
    told = world_config(world, "cache.blocks=[3]", "views.shape=[32,48]")
    cache_teacher(told, shards, tmp_path / "cache", mode="append")
    info = cache_info(tmp_path / "cache")
    assert [(t.image_size, t.records) for t in info.teachers] == [(SIZE, 40), (32, 40)]


def test_models_that_need_a_square() -> None:
    for name, why in (("convit_tiny", "does not run on images of 64x96 pixels"), ("nest_tiny", "only handles square")):
        with pytest.raises(UserError, match=f"student.name {name}: .*{why}.*; take a square, such as image_size 64$"):
            create_model(
                name,
                (64, 96),
                {"depth": 1, "embed_dim": 48} if name == "convit_tiny" else {},
                None,
                False,
                "student.name",
            )
    with pytest.raises(
        UserError, match="image_size 60x96 is not a multiple of the patch size 16; the nearest is 64x96"
    ):
        create_model("vit_tiny_patch16_224", (60, 96), {}, None, False, "student.name")


def test_positions_of_a_start_from_another_shape() -> None:
    """`student.init`: channels are selected, and the grid of 4 x 4 becomes one of 4 x 6."""
    source, student = (
        make_vit(),
        create_model(
            "vit_tiny_patch16_224",
            SIZE,
            {"embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": 8},
            None,
            False,
            "model",
        ),
    )
    with torch.no_grad():
        source.model.pos_embed[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]  # the number of the column
    found = select_weights(source.model, student.model)["pos_embed"][0, 1:, 0].view(4, 6)
    assert torch.all(found.diff(dim=1) > 0)
    torch.testing.assert_close(found, found[:1].expand(4, 6), atol=1e-5, rtol=0)


def test_patches_that_are_not_square() -> None:
    args = {"embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": [8, 16]}
    model = create_model("vit_tiny_patch16_224", SIZE, args, None, False, "model")
    assert model.grid == (4, 3) and block_outputs(model.model, pictures(1), [1])[1].shape == (1, 1 + 12, 12)


def test_a_suffix_of_rectangles() -> None:
    """Of a model with rotary embeddings, whose grid the suffix keeps."""
    torch.manual_seed(seeded(0))
    args = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    model = create_model("vit_small_patch16_dinov3", SIZE, args, None, False, "model")
    model.model.eval()
    state = find_suffix(model.model, model.architecture, model.model_args, 0, SIZE)
    assert state is not None
    suffix = TeacherSuffix(model.architecture, model.model_args, 0, state)
    with torch.no_grad():
        outputs = block_outputs(model.model, pictures(2), [0, 2])
    torch.testing.assert_close(suffix.last_output(outputs[0], 0), outputs[2], atol=1e-5, rtol=1e-5)


def test_modules_of_ones_own() -> None:
    """The description has both numbers."""

    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = torch.nn.Conv2d(3, 6, 8, 8), torch.nn.ModuleList([torch.nn.Linear(6, 6)])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layers[0](self.embed(images).flatten(2).transpose(1, 2))

    own = as_backbone(Rows(), Description(blocks="layers", image_size=SIZE, patch_size=8))
    assert own.forward_intermediates(pictures(1), [0], output_fmt="NCHW")[0].shape == (1, 6, 4, 6)
    with pytest.raises(UserError, match="image_size 32x44 is not a multiple of the patch size 8; the nearest is 32x48"):
        as_backbone(Rows(), Description(blocks="layers", image_size=(32, 44), patch_size=8))


def test_settings_of_probes_in_words() -> None:
    settings = (("tokens", "both"), ("image_size", SIZE))
    assert "at 32x48 px" in Probe("classification", (), (), 1, 1, settings, "x").words
