"""What a sweep refuses before it trains anything."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import world_config
from sweeping import RUNS, run, write

from pipeline.stages.cache_teacher import cache_teacher
from pipeline.sweeps.run import sweep
from singer.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill.objective": "msee"}, "run bad: distill.objective: unknown 'msee'"),
        ({"refine.normaliser": "nrom"}, "refiner clip-nrom: refine.normaliser: unknown 'nrom'"),
        ({"student.name": "resnet18_x"}, "run bad: student.name: timm has no model 'resnet18_x'"),
        ({"student.name": "vit", "student.dim": 25}, "run bad: student.dim 25 is not a multiple"),
        ({"student.init": "nowhere"}, "run bad: student.init: no file or folder nowhere"),
        (
            {"distill.objective": "vitkd", "distill.token_share": 0.5},
            "run bad: distill.objective vitkd needs all patches .* a share of them; set distill.token_share=1",
        ),
        ({"distill.trackers": ["foo"]}, "run bad: distill.trackers: unknown 'foo'; known: aim"),
        ({"distill.trackers": ["aim"]}, "run bad: distill.trackers: aim is not installed; pip install aim"),
        (
            {"distill.projector": "none"},
            r"run bad: distill.projector none .* the student has \d+ channels where its teacher has \d+; take another",
        ),
        ({"distill.block_weights": [1]}, "run bad: distill.block_weights: 1 weights for 2 blocks"),
        ({"distill.trained": ["nothing"]}, "run bad: distill.trained: no weights 'nothing' would be trained"),
        (
            {"distill.overlap": "other", "distill.objective": "gram"},
            "run bad: distill.overlap: objective gram does not",
        ),
        ({"distill.holdout": 0.9999}, "run bad: distill.holdout: all 100 images would be held out"),
        ({"distill.teacher_drop": 0.5}, "run bad: distill.teacher_drop is for several teachers"),
        ({"distill.teacher_weights": [1, 1]}, "run bad: distill.teacher_weights: 2 given for 1 --cache"),
        ({"distill.objective": "zero-shot"}, "run bad: distill.objective zero-shot needs distill.texts"),
        (
            {"student.dim": 48, "student.init": "teacher"},
            "run bad: student.init teacher: .* has 24 channels",
        ),
        (
            {"student.dim": 48, "student.init": "{teacher}"},
            "run bad: student.init .*: it has 24 channels",
        ),
        ({"student.lora": 10**6, "student.init": "teacher"}, "run bad: student.lora 1000000 is larger than"),
        ({"student.depth": 1}, "run bad: 2 teacher blocks cannot be matched to 1 student blocks"),
        (
            {"student.name": "selecsls42", "student.checkpointing": True},
            "run bad: student.checkpointing: selecsls42 cannot do it; set it to false",
        ),
    ],
)
def test_a_run_that_cannot_train_is_named_first(
    settings: dict[str, Any], message: str, world: Path, tmp_path: Path
) -> None:
    if settings.get("student.init") == "{teacher}":
        settings = settings | {"student.init": str(world / "teacher")}
    file = write(world, tmp_path / "s.yaml", runs=[{"name": "good"}, {"name": "bad", "set": settings}])
    with pytest.raises(UserError, match=message):
        run(world, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_moved_are_missed_first(world: Path, tmp_path: Path) -> None:
    """A sweep whose runs are all trained does not need them."""
    folder, place = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for shard in sorted((world / "train").glob("*.tar")):
        shutil.copy(shard, folder)
    config = world_config(world, "views.pixels=none")
    cache_teacher(config, [str(tar) for tar in sorted(folder.glob("*.tar"))], place)
    folder.rename(tmp_path / "moved")
    file = write(world, tmp_path / "s.yaml", "distill.epochs=1", runs=RUNS[2:3])
    with pytest.raises(UserError, match="of the cache is gone; if it has moved, give its place with --images"):
        sweep(file, place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moved = str(tmp_path / "moved" / "*.tar")
    assert sweep(file, place, tmp_path / "out", images=moved).failed == {}
    assert sweep(file, place, tmp_path / "out", "resume").failed == {}


def test_half_a_pair_of_shards_is_refused(world: Path, tmp_path: Path) -> None:
    file = write(world, tmp_path / "s.yaml", runs=RUNS)
    with pytest.raises(UserError, match="probes need both --train and --test"):
        run(world, file, tmp_path / "out", train=str(world / "train" / "*.tar"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("probe", "settings", "message"),
    [
        ("segmentation", {}, "probe segmentation of run mse: --task segmentation needs evaluate.seg_classes"),
        ("segmentation", {"evaluate.seg_classes": 3}, "has no .seg.png; every image needs one here"),
        ("depth", {}, "has no .depth.png; every image needs one here"),
        ("domain-shift", {"evaluate.class_map": "none.json"}, "evaluate.class_map: none.json: No such file"),
    ],
)
def test_probes_are_checked_before_anything_is_trained(
    world: Path, tmp_path: Path, probe: str, settings: dict[str, Any], message: str
) -> None:
    runs = [{"name": "mse", "set": settings}]
    file = write(world, tmp_path / "s.yaml", runs=runs, probes=["classification", probe])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run(world, file, tmp_path / "out", probed=True)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
