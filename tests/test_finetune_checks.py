"""What fine-tuning refuses before it trains: settings, images and runs that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import config_with, shards, world_config
from finetuning import SETS

from pipeline.stages.finetune import finetune
from pipeline.stages.prepare import prepare
from singer.errors import UserError

ERRORS: dict[str, tuple[list[str], str]] = {
    "image size": (["finetune.image_size=30"], "image_size 30 is not a multiple of the patch size 8"),
    "held out": (["finetune.holdout=0.999"], "finetune.holdout: all 100 images would be held out"),
    "warm-up": (["finetune.warmup_epochs=9"], "--set finetune.warmup_epochs=0.2"),
    "best": (["finetune.keep=best"], "hold some out (--set finetune.holdout=0.02)"),
    "range": (["finetune.scale=[0.5, 0.1]"], "finetune.scale: 0.5 is larger than 0.1"),
    "tracker": (["finetune.trackers=[nothing]"], "finetune.trackers: unknown 'nothing'"),
    "no teacher": (["finetune.teacher=run"], "finetune.teacher: no teacher takes part; set finetune.kd=soft (or hard)"),
    "hard": (
        ["finetune.kd=hard", "finetune.kd_temperature=2"],
        "kd_temperature: 2 is for soft labels; set finetune.kd",
    ),
}


def test_too_few_images_to_choose_a_probe(world: Path, distilled: Path, tmp_path: Path) -> None:
    """This is said before anything is written, so that the remedy works as printed."""
    two, out = tmp_path / "two", tmp_path / "out"
    for name in ("class0", "class1"):
        source = next((world / "images" / "train" / name).iterdir())
        (two / name).mkdir(parents=True)
        shutil.copyfile(source, two / name / source.name)
    sets = ["finetune.epochs=1", "finetune.batch_size=2", "finetune.warmup_epochs=0", "finetune.trackers=[]"]
    with pytest.raises(UserError, match="has 2 images: .* or one strength: --set 'evaluate.strengths") as caught:
        finetune(world_config(world, *sets, "evaluate.strengths=[0.01, 1]"), distilled, two, out)
    assert not out.exists()
    remedy = str(caught.value).rpartition("--set ")[2].strip("'")
    assert finetune(world_config(world, *sets, remedy), distilled, two, out).finetuned.images == 2


@pytest.mark.parametrize("what", ERRORS)
def test_settings_that_do_not_fit(world: Path, distilled: Path, tmp_path: Path, what: str) -> None:
    sets, message = ERRORS[what]
    with pytest.raises(UserError) as error:
        finetune(world_config(world, *SETS, *sets), distilled, shards(world), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_images_and_runs_that_do_not_fit(world: Path, distilled: Path, tmp_path: Path) -> None:
    """Each is told in one line, and nothing is written."""
    config, out = world_config(world, *SETS), tmp_path / "out"
    flat, one = tmp_path / "flat", tmp_path / "one"
    for folder in (flat, one / "class0"):
        shutil.copytree(world / "images" / "train" / "class0", folder)
    unfinished = shutil.copytree(distilled, tmp_path / "unfinished")
    (unfinished / "run.json").unlink()
    own = shutil.copytree(distilled, tmp_path / "own")
    described = json.loads((own / "student" / "config.json").read_text())
    (own / "student" / "config.json").write_text(json.dumps({**described, "architecture": "own:Net"}))
    data = shards(world)
    gone = shutil.copytree(distilled, tmp_path / "gone")
    (gone / "student" / "model.safetensors").unlink()
    given: list[tuple[Path, str | Path, Path, str]] = [
        (gone, data, out, "gone is not a finished run: .*model.safetensors is missing"),
        (distilled, flat, out, "--train: 25 of 25 images have no .cls label"),
        (distilled, one, out, "--train has images of one class only; a classifier needs two"),
        (unfinished, data, out, "unfinished is not a finished run: it has no run.json"),
        (own, data, out, "own:Net, and finetune gives heads to models of timm only"),
        (distilled, data, distilled / "tuned", "overlaps the input"),
    ]
    for place, train, to, message in given:
        with pytest.raises(UserError, match=message):
            finetune(config, place, train, to)
    assert not out.exists()


def test_what_is_wrong_with_the_test_is_found_before_training(world: Path, distilled: Path, tmp_path: Path) -> None:
    train, test, out = tmp_path / "train", tmp_path / "test", tmp_path / "out"
    shutil.copytree(world / "train", train, ignore=shutil.ignore_patterns("classes.json"))
    shutil.copytree(world / "test", test)
    (test / "classes.json").write_text(json.dumps([f"class{n}" for n in range(9)]))
    few = tmp_path / "few"
    shutil.copytree(world / "images" / "train", tmp_path / "images", ignore=shutil.ignore_patterns("class3"))
    prepare(config_with(f"prepare.classes={world / 'train' / 'classes.json'}"), tmp_path / "images", few)
    size = ["evaluate.image_size=30"], "not a multiple of the patch size"
    given = [
        (train, str(test / "*.tar"), [], "--test has 9 classes, but --train has"),
        (
            train,
            shards(world),
            ["evaluate.class_map=map.json"],
            r"evaluate\.class_map: the classes of finetune are those",
        ),
        (train, shards(world), *size),
        # The head has a class for each name. Without names, it has those of the labels.
        (few, shards(world), *size),
        (
            shutil.copytree(few, tmp_path / "nameless"),
            shards(world),
            [],
            "--test has class 'class3', of which --train has no image",
        ),
    ]
    (tmp_path / "nameless" / "classes.json").unlink()
    for images, tested, sets, message in given:
        with pytest.raises(UserError, match=message):
            finetune(world_config(world, *SETS, *sets), distilled, str(images / "*.tar"), out, tested)
    assert not out.exists()
