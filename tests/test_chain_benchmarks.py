"""The benchmarks on the chain with a real teacher, with a random teacher and a few images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import config_with, draw_images, seeded
from PIL import Image
from safetensors.torch import save_file

from pipeline import prepare

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETS = (
    "views.pixels=uint8",
    "distill.batch_size=16",
    "refine.steps=5",
    "evaluate.neighbours=3",
    "evaluate.seg_passes=1",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds teacher.safetensors and data/, with the shards that the benchmarks read."""
    root = tmp_path_factory.mktemp("chain")
    model = timm.create_model("vit_tiny_patch16_224")
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, root / "teacher.safetensors")
    random = np.random.default_rng(seeded(0))
    (root / "data").mkdir()
    for number, (name, shards) in enumerate(
        [("tinyimagenet50-train", 2), ("tinyimagenet50-val", 1), ("camvid-train", 2), ("camvid-test", 1)]
    ):
        images = root / name
        draw_images(images, 4, 8 * shards, seed=number)
        for image in images.rglob("*.png") if name.startswith("camvid") else ():
            mask = Image.fromarray(random.integers(0, 12, (20, 24), dtype=np.uint8))
            with Image.open(image) as opened:
                mask.resize(opened.size, Image.Resampling.NEAREST).save(image.with_suffix(".seg.png"))
        prepare(config_with("prepare.shard_images=32"), images, root / "packed" / name)
        for shard in (root / "packed" / name).glob("*.tar"):
            shard.rename(root / "data" / f"{name}-{shard.stem[-6:]}.tar")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        (
            "equal_time.py",
            ("--budgets", "9"),
            ("ours, seed 0 | 9.00", "joint, seed 0 | 1.00", "joint with our", "joint with these"),
        ),
        ("equal_time.py", ("--budgets", "9", "--set", "student.image_size=64"), ("ours, seed 0 | 9.00",)),
        ("levers.py", ("--passes", "2", "--shards", "2", "--levers", "the recipe", "2 crops"), ("2 crops | ",)),
    ],
)
def test_rows(chain: Path, tmp_path: Path, script: str, options: tuple[str, ...], rows: tuple[str, ...]) -> None:
    sets = [word for one in SETS for word in ("--set", one)]
    found = printed(chain, script, "--out", str(tmp_path / "out"), "--data", str(chain / "data"), *options, *sets)
    assert all(row in found for row in rows), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "row"),
    [
        ("write_speed.py", ("--codecs", "int4", "--images", "32", "--gigabytes", "0.01"), "| int4 | "),
        ("cached_vs_online.py", ("--set", "distill.batch_size=16", "--steps", "2"), "online / cached: "),
    ],
)
def test_speeds(chain: Path, script: str, options: tuple[str, ...], row: str) -> None:
    shards = str(chain / "data" / "tinyimagenet50-train-*.tar")
    assert row in printed(chain, script, "--shards", shards, "--rounds", "1", *options)


def printed(chain: Path, script: str, *options: str) -> str:
    """Run a benchmark with the teacher of the chain, and return what it prints."""
    command = [sys.executable, str(BENCHMARKS / script), "--teacher", str(chain / "teacher.safetensors"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
