"""The recipes of other families than ViT: their models exist, and one step of each runs on shrunk models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import draw_images, seeded

from pipeline.cache.reader import Cache
from pipeline.config import load_config
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import create_model
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from singer.backbones import depth, gives_tokens, has_cls, patch_size, resolve_blocks
from singer.suffix import outline

_VIT = {"embed_dim": 48, "depth": 4, "num_heads": 2}
_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
# recipe: the class of its teacher, what shrinks the teacher, what shrinks the student (or a smaller one of its class)
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | str]] = {
    "dinov3-l-to-s": ("Eva", _VIT, _VIT),
    "dinov3-7b-to-b": ("Eva", _VIT, _VIT),
    "siglip2-so400m-to-s": ("VisionTransformer", _VIT, _VIT),
    "eva02-l-to-ti": ("Eva", _VIT, _VIT),
    "radio-l-to-s": ("VisionTransformer", _VIT, _VIT),
    "dinov2-b-registers": ("VisionTransformer", _VIT, _VIT),
    "convnext-dinov3-to-mobilenet": ("ConvNeXt", _STAGES, "mobilenetv4_conv_small_050"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("recipes")
    draw_images(root / "images", 2, 4)
    prepare(load_config(), root / "images", root / "shards")
    return str(root / "shards" / "*.tar")


@pytest.mark.parametrize("name", RECIPES)
def test_models_of_a_recipe_fit_it(name: str) -> None:
    """Weights exist, sizes fit the patches, blocks are the usual ones, and CLS of a teacher has one to learn it."""
    config = load_config(name)
    assert config.teacher.name in timm.list_pretrained(f"{config.teacher.name.partition('.')[0]}*")
    teacher, student = outline(config.teacher.name, {}), outline(config.student.name, {})
    assert type(teacher).__name__ == RECIPES[name][0]
    for model, size in ((teacher, config.teacher.image_size), (student, config.student.image_size)):
        assert size is not None and size % (patch_size(model) or 32) == 0
    assert config.cache.blocks is not None
    usual = None if gives_tokens(teacher) else [-2, -1]
    if config.student.registers:  # the recipe makes a clean copy of its teacher, by its last block
        usual = [-1]
    assert list(config.cache.blocks) == resolve_blocks(usual, depth(teacher))
    assert has_cls(teacher) == has_cls(student)


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_of_a_recipe(name: str, shards: str, tmp_path: Path) -> None:
    config, (kind, teacher_args, student_args) = load_config(name), RECIPES[name]
    # Copies are shifted by a patch at least, and by a seventh of the side at most.
    size = (4 if config.teacher.copies == 1 else 7) * (14 if "patch14" in config.teacher.name else 16)
    student, args = (student_args, {}) if isinstance(student_args, str) else (config.student.name, student_args)
    architecture = config.teacher.name.partition(".")[0]
    torch.manual_seed(seeded(0))
    models = {
        "teacher": create_model(architecture, size, teacher_args, None, False, "model"),
        "student": create_model(student, size, args, None, False, "model"),
    }
    assert type(models["teacher"].model).__name__ == kind
    for which, model in models.items():
        save_backbone(model, model.model.state_dict(), tmp_path / which)
    # Everything but the size of the models, and what is bound to it, is the recipe's.
    sets = [f"teacher.name=local-dir:{tmp_path / 'teacher'}", f"student.name=local-dir:{tmp_path / 'student'}"]
    sets += [f"{section}.image_size={size}" for section in ("teacher", "student")]
    sets += [
        "views.count=1",
        "cache.blocks=[2,3]",
        "cache.workers=1",
        "refine.steps=2",
        "distill.batch_size=8",
        "distill.epochs=1",
        "distill.warmup_epochs=0",
        *(["distill.trained=[reg_token,pos_embed,patch_embed,blocks.3]"] if config.distill.trained else []),
    ]
    config = load_config(name, [*sets, "distill.workers=1", "distill.trackers=[]"])
    cache_teacher(config, shards, tmp_path / "cache")
    assert Cache(tmp_path / "cache").blocks == (2, 3)
    refine(config, tmp_path / "cache", tmp_path / "refiner")
    run = distill(config, tmp_path / "cache", tmp_path / "run", tmp_path / "refiner")
    assert run.steps == 1 and np.isfinite(run.loss)
