"""Bundled recipes: those that are called the paper's are, line by line; this project's own way has names of its own."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, load_config, recipes, resource
from pipeline.training.schedule import learning_rate, peak_rate

ROOT = Path(__file__).parent.parent
STUDENTS = {"vit-l-to-ti": "vit_tiny_patch16_224", "vit-l-to-s": "vit_small_patch16_224"}
OWN = {name: f"{name}-singer" for name in STUDENTS}
# The paper's settings (arXiv 2509.20986), with the keys that hold them. Epochs are of one view each; see EPOCHS.
PAPER: dict[str, Any] = {
    # ViT-L, its 18th and 24th blocks
    "teacher.name": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "teacher.image_size": 224,
    "student.image_size": 224,
    "student.pretrained": False,
    "cache.blocks": (17, 23),
    "cache.token_share": 1.0,
    # not quantised
    "cache.codec": "float16",
    # RandomResizedCrop and flip, nothing else
    "views.kind": "random-resized-crop",
    "views.scale": (0.08, 1.0),
    "views.ratio": (3 / 4, 4 / 3),
    "views.flip": 0.5,
    "views.color": (0.0, 0.0, 0.0, 0.0),
    # adapters: rank 64 in the smallest directions of the next block's weights, up = down transposed, with the student
    "distill.joint": True,
    "refine.variant": "paper",
    "refine.cleaner": "adapter",
    "refine.rank": 64,
    "refine.basis": "weights",
    "refine.start": "doubled",
    "refine.normaliser": "none",
    # L_KD + 0.01 L_outlier + 1.0 L_info, γ = 0.97, and no other term
    "distill.objective": "mse",
    "distill.kd_weight": 1.0,
    "refine.outlier_form": "paper",
    "refine.quantile": 0.97,
    "refine.outlier_weight": 0.01,
    "refine.info_form": "paper",
    "refine.info_weight": 1.0,
    "refine.keep_weight": 0.0,
    # AdamW, 512, cosine to 1e-4 of the rate, no clipping, no average
    "distill.optimizer": "adamw",
    "distill.batch_size": 512,
    "distill.lr": 1e-3,
    # a student that begins from random weights
    "student.init": "random",
    "distill.final_lr": 1e-4,
    "distill.weight_decay": 1e-4,
    "distill.clip_grad": None,
    "distill.ema": None,
}
EPOCHS, WARMUP = 100, 5


def value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def header(name: str) -> str:
    """The comment above a recipe."""
    text = (resource("configs") / f"{name}.yaml").read_text()
    lines = [line.removeprefix("#").strip() for line in text.split("\n") if line.startswith("#")]
    return " ".join(lines)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("key", PAPER)
def test_the_papers_recipes_are_the_papers(name: str, key: str) -> None:
    assert value(load_config(name), key) == PAPER[key]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_papers_epochs_are_spread_over_the_views(name: str) -> None:
    """An epoch passes over all views, so that as many crops are seen as in the paper, and as many in the warm-up."""
    config = load_config(name)
    views = config.views.count
    assert config.student.name == STUDENTS[name]
    assert views > 1 and views * config.distill.epochs == EPOCHS
    assert views * config.distill.warmup_epochs == pytest.approx(WARMUP)
    steps = 1000
    peak = peak_rate(config.distill, 192)
    assert max(learning_rate(config.distill, s, steps, peak) for s in range(config.distill.epochs * steps)) == 1e-3
    assert learning_rate(config.distill, config.distill.epochs * steps - 1, steps, peak) == pytest.approx(1e-7)


@pytest.mark.parametrize("name", STUDENTS)
def test_headers_say_what_a_cache_cannot_copy(name: str) -> None:
    said = header(name)
    assert f"the paper's {'main' if name.endswith('ti') else 'second'} recipe" in said.lower()
    assert "fresh crop" in said and "TB" in said and "views.count" in said
    size = 2 * 197 * 1024 * 2
    assert f"{size / 1e6:.2f} MB an image" in said and f"{size * 1_281_167 / 1e12:.2f} TB" in said
    assert "singer distill" in said and "--refiner" not in said


def test_only_the_papers_recipes_are_called_so() -> None:
    """By their headers and the README; no recipe that has a normaliser, or a refiner of its own, is among them."""
    called = {name for name in recipes() if re.match(r"the paper's \w+ recipe", header(name).lower())}
    assert called == set(STUDENTS)
    for name in set(recipes()) - called:
        assert "as in the paper" not in header(name), name
    for name in called:
        assert load_config(name).refine.normaliser == "none"
    (line,) = re.findall(r"^- The paper's:.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name in recipes() if f"`{name}`" in line} == called


@pytest.mark.parametrize("paper", STUDENTS)
def test_this_projects_own_way(paper: str) -> None:
    """The same teacher, views, blocks, student and schedule; the default refiner, frozen, start and optimiser."""
    own, theirs, default = load_config(OWN[paper]), load_config(paper), Config()
    assert (own.teacher, own.views) == (theirs.teacher, theirs.views)
    assert own.student == theirs.student.model_copy(update={"init": "auto"})
    assert own.cache.blocks == theirs.cache.blocks
    assert own.refine == default.refine and not own.distill.joint
    learning = {key: getattr(default.distill, key) for key in ("joint", "optimizer", "lr")}
    assert own.distill == theirs.distill.model_copy(update=learning)
    assert "own way" in header(OWN[paper])


@pytest.mark.parametrize("name", sorted(set(recipes()) - set(STUDENTS)))
def test_other_recipes_have_the_default_refiner(name: str) -> None:
    """A copy of the teacher that is to take its place learns features in their own scale."""
    config, default = load_config(name), Config().refine
    copied = config.distill.projector == "none"
    assert config.refine == default.model_copy(update={"normaliser": "none"} if copied else {})


@pytest.mark.parametrize("name", recipes())
def test_muon_has_the_rate_of_its_rule(name: str) -> None:
    """Published rates are AdamW's, and far too low for it."""
    settings = load_config(name).distill
    assert settings.optimizer == "adamw" or settings.lr == "auto"


@pytest.mark.parametrize("name", recipes())
def test_no_recipe_trains_for_long_on_one_crop(name: str) -> None:
    config = load_config(name)
    assert config.views.kind == "random-resized-crop" or config.distill.epochs <= 10
