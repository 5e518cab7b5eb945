"""A tiny world: images in shards, a random teacher with one planted artifact direction, and what the stages make."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from stores import LOCK_SECONDS, Server

import cli
from pipeline.cache.stored import Decoded, Encoded
from pipeline.config import Config, dump_config, load_config
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.loading import LOCAL
from pipeline.runtime.logs import is_log, on_console
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from pipeline.storage import locks
from pipeline.training.batch import Batch
from pipeline.training.distilling.targets import Targets
from singer.backbones import block_outputs

# No test asks the network, whose answers are luck and take their time; neither do the processes that they start.
os.environ["HF_HUB_OFFLINE"] = "1"
huggingface_hub.constants.HF_HUB_OFFLINE = True
# The tests' processes, and those that they start, have one number of threads: results depend on it in the last bits.
# Processes that are only told by the environment never take more than there are cores.
THREADS = min(int(os.environ.setdefault("OMP_NUM_THREADS", "1")), len(os.sched_getaffinity(0)))
# A killed process leaves what it wrote to the system, which writes it to the disk; no test cuts the power.
os.fsync = lambda file: None
# The one place from which every seed of the tests derives; `make luck` changes it.
SEED = int(os.environ.get("SINGER_TEST_SEED", "0"))
torch.set_num_threads(THREADS)
# Machines with other work take their time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def seeded(number: int) -> int:
    """The seed that a test calls `number`: that number itself, unless SINGER_TEST_SEED changes them all."""
    return 1000 * SEED + number


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws the same examples in every run, and others for another SINGER_TEST_SEED."""
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(SEED)


SIZE, PATCH, WIDTH, DEPTH = 32, 8, 24, 4
SETTINGS = [
    f"teacher.image_size={SIZE}",
    "cache.blocks=[2,3]",
    "cache.batch_size=7",
    "cache.workers=1",
    "views.pixels=none",
    "refine.cleaner=adapter",
    "refine.basis=weights",
    "refine.expect_weight=0",
    "refine.lr=1e-2",
    "student.init=random",
    "refine.rank=4",
    "refine.steps=60",
    "refine.batch_size=16",
    "refine.holdout=0.2",
    "student.dim=12",
    "student.depth=3",
    "student.heads=2",
    f"student.patch_size={PATCH}",
    "distill.projector=linear",
    "distill.token_share=1",
    "distill.epochs=2",
    "distill.batch_size=16",
    "distill.workers=1",
    "distill.trackers=[]",
    "evaluate.workers=1",
    *(f"{section}.seed={seeded(0)}" for section in ("refine", "distill", "evaluate")),
]


def make_vit(architecture: str = "vit_tiny_patch16_224", seed: int = 0, **args: object) -> Backbone:
    """A small random model of a timm family."""
    args = {
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "patch_size": PATCH,
        "img_size": SIZE,
        "num_classes": 5,
    } | args
    torch.manual_seed(seeded(seed))
    model = timm.create_model(architecture, pretrained=False, **args).eval()
    return Backbone(model, architecture, dict(args), int(str(args["img_size"])), (0.5,) * 3, (0.5,) * 3)


def plant_artifacts(vit: Backbone, token: int = 5) -> None:
    """One patch position gets a large value along one channel, from the first block on."""
    with torch.no_grad():
        vit.model.pos_embed[0, token, 3] += 60.0


def draw_images(folder: Path, classes: int, each: int, seed: int = 0, start: int = 0) -> None:
    """Random images whose class is their colour."""
    rng = np.random.default_rng(seeded(seed))
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
        for i in range(start, start + each):
            pixels = rng.integers(0, 90, (20 + i % 3 * 5, 24, 3), dtype=np.uint8)
            pixels[..., c % 3] += 40 * (1 + c // 3)
            Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")


def run_singer(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run a command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["singer", *map(str, args)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def block_output(model: torch.nn.Module, block: int) -> torch.Tensor:
    """What a block says of two images, the same for all models."""
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeded(1)))
    with torch.inference_mode():
        return block_outputs(model, images, [block])[block]


def config_with(*sets: str) -> Config:
    return load_config(sets=[*SETTINGS, *sets])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds train/ and test/ shards, teacher/, cache/ and adapters/; tests only read it."""
    root = tmp_path_factory.mktemp("world")
    teacher = make_vit()
    plant_artifacts(teacher)
    save_backbone(teacher, teacher.model.state_dict(), root / "teacher")
    for split, each in (("train", 25), ("test", 10)):
        draw_images(root / "images" / split, 4, each, seed=each, start=each)
        prepare(config_with("prepare.shard_images=30"), root / "images" / split, root / split)
    config = world_config(root)
    cache_teacher(config, str(root / "train" / "*.tar"), root / "cache")
    refine(config, root / "cache", root / "adapters")
    return root


def shards(root: Path, split: str = "train") -> str:
    """What --images takes of a split of the world."""
    return str(root / split / "*.tar")


@pytest.fixture(scope="session")
def few_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shards of twenty images of two classes; tests only read them."""
    root = tmp_path_factory.mktemp("few")
    draw_images(root / "images", 2, 10)
    prepare(config_with(), root / "images", root / "shards")
    return str(root / "shards" / "*.tar")


# In place of the world's student.
RESNET = ["student.name=test_resnet", *(f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size"))]


def world_config(root: Path, *sets: str) -> Config:
    return config_with(f"teacher.name={LOCAL}{root / 'teacher'}", *sets)


@pytest.fixture(scope="session")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that were trained until artifacts vanish, which takes longer than the world's had."""
    out = tmp_path_factory.mktemp("trained") / "adapters"
    refine(world_config(world, "refine.steps=150"), world / "cache", out)
    return out


@pytest.fixture(scope="session")
def distilled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled student, to be fine-tuned; tests only read it."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    distill(world_config(world, "distill.epochs=1", "distill.optimizer=adamw"), world / "cache", out)
    return out


@pytest.fixture(scope="session")
def config_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's configuration as a file, for the command line."""
    file = tmp_path_factory.mktemp("config") / "world.yaml"
    file.write_text(dump_config(world_config(world)))
    return file


@pytest.fixture
def config(world: Path) -> Config:
    return world_config(world)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results must not depend on what ran before."""
    torch.manual_seed(seeded(0))
    yield


@pytest.fixture(autouse=True)
def messages() -> Iterator[None]:
    """Functions tell on stderr what their commands would."""
    with on_console():
        yield


def targets_of(targets: Targets, encoded: Encoded) -> dict[int, torch.Tensor]:
    """Return normalised targets {block: (B, N, d)} of stored records, as a step makes them."""
    decoded = targets.decode(encoded)
    return targets.target_tokens(targets.refine(decoded.blocks).normalised, decoded.positions)


def tree_bytes(folder: Path, *leave_out: str) -> dict[str, bytes]:
    """Every file below a folder with its content; logs belong to no output."""
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in leave_out and not is_log(f.name)
    }


def make_batch(features: list[Decoded], records: int, pixels: torch.Tensor | None = None) -> Batch:
    """Return a batch of records of equal weights, of random images of 32 x 32 pixels if none are given."""
    if pixels is None:
        pixels = torch.randint(256, (records, 32, 32, 3), dtype=torch.uint8)
    return Batch({32: pixels}, features, torch.full((records,), 1 / records), torch.zeros(records))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests, as it takes seconds to start; each empties it first."""
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


def use_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make s3://bucket an empty bucket of the server."""
    server.empty()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(locks, "SECONDS", LOCK_SECONDS)


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use_server(server, monkeypatch)


@pytest.fixture
def url(request: pytest.FixtureRequest, s3: None) -> str:
    """A prefix of this test's own."""
    return f"s3://bucket/{request.node.name}".translate(str.maketrans("[]", "--"))
