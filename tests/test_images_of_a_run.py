"""Which images and which of their patches a student learns from: shares, held-out ones, moved shards."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import make_batch, world_config
from training_runs import CPU

from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.config import Config
from pipeline.data import relocate
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.subset import split_images
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching, explained_variance, squares
from pipeline.training.run_log import read_log
from pipeline.training.schedule import token_share
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.patch_dropout import install


def test_moved_shards(world: Path, config: Config, tmp_path: Path) -> None:
    cache = Cache(world / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in cache.index.images.paths:
        (moved / path.name).write_bytes(path.read_bytes())
    images = relocate(cache.index.images, str(moved / "*.tar"))
    assert {p.parent for p in images.paths} == {moved}
    first = moved / cache.index.images.paths[0].name
    first.write_bytes(first.read_bytes() + b"\0" * 512)
    with pytest.raises(UserError, match="has changed since it was cached"):
        relocate(cache.index.images, str(moved / "*.tar"))
    first.unlink()
    twins = []
    for i, path in enumerate(sorted(moved.glob("*.tar"))):
        (moved / f"{i}").mkdir()
        twins.append(path.rename(moved / f"{i}" / "x.tar"))
    with pytest.raises(UserError, match="gives 3 sources with repeated names; the cache has 4"):
        relocate(cache.index.images, [str(p) for p in twins])
    (moved / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match=f"--images does not give {first.name}"):
        relocate(cache.index.images, str(moved / "*.tar"))


def test_a_student_sees_a_share_of_its_patches(world: Path, tmp_path: Path) -> None:
    """The targets are those of the kept patches; the share is whole at the end; a resumed run draws the same."""
    student, cache = new_student(world_config(world).student, 32), Cache(world / "cache")
    targets = Targets(cache, None, student, CPU)
    settings = world_config(world, "distill.epochs=4", "distill.token_share=0.5").distill
    model = Distiller(student, [TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1.0}), whole=False)])
    model.drop_patches(0.5, settings)
    features = Decoded(cache.features([0, 1, 2], CPU))
    batch = make_batch([features], 3)
    whole, _ = model(batch)
    assert model.dropout is not None and model.dropout.kept is None
    model.dropout.share = 0.25
    part, errors = model(batch)
    kept = model.dropout.kept
    assert kept is not None and kept.shape == (3, 4) and part.keys() == whole.keys() and not errors
    found = targets.target_tokens(features.blocks, None, kept)
    for block, tokens in targets.target_tokens(features.blocks, None).items():
        for row in range(3):
            assert torch.equal(found[block][row, 1:], tokens[row, 1:][kept[row]])
    model.eval()
    losses, errors = model(batch)
    assert losses == whole and errors.keys() == {"2", "3", "tokens"}
    assert [token_share(0.5, settings, step, 10) for step in (0, 29, 30, 39)] == [0.5, 0.5, 1, 1]
    sets = ["distill.token_share=0.5", "distill.whole_share=0.5"]
    run = distill(world_config(world, *sets), world / "cache", tmp_path / "run", world / "adapters")
    timm.create_model(f"local-dir:{run.student}", pretrained=True)
    no_shape = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    for given, message in (
        (["distill.objective=vitkd"], "vitkd"),
        (["student.name=test_resnet", *no_shape], "cannot leave out patches; set it to 1"),
    ):
        with pytest.raises(UserError, match=message):
            distill(world_config(world, *sets, *given), world / "cache", tmp_path / "wrong", world / "adapters")


def test_patches_with_rotary_positions_keep_their_places() -> None:
    """Nothing is left out in eval mode; in training, the embedding of the kept patches goes with them."""
    model = timm.create_model("vit_small_patch16_dinov3", img_size=32, embed_dim=48, depth=2, num_heads=2, patch_size=8)
    dropout = install(model)
    images = torch.randn(2, 3, 32, 32)
    whole = block_outputs(model.eval(), images, [1])[1]
    dropout.share = 0.5
    assert torch.equal(block_outputs(model, images, [1])[1], whole)
    tokens = block_outputs(model.train(), images, [1])[1]
    assert dropout.kept is not None and dropout.kept.shape == (2, 8) and tokens.shape == (2, 5 + 8, 48)


def test_views_that_were_appended_stay_with_their_images(world: Path, tmp_path: Path) -> None:
    """No image is held out in one view and trained on in another; chosen images have all their views."""
    shards = str(world / "train" / "*.tar")
    for count, mode in ((1, "new"), (3, "append")):
        config = world_config(world, "cache.blocks=[3]", "views.flip=0.5", f"views.count={count}")
        cache_teacher(config, shards, tmp_path / "c", mode)
    cache = Cache(tmp_path / "c")
    images = cache.index.digest[cache.index.image]
    assert len(images) == 300 and np.unique(cache.index.image).size == 200
    for by in ("random", "prototypes"):
        settings = config.distill.model_copy(update={"holdout": 0.2, "share": 0.5, "share_by": by})
        train, held_out = split_images(cache, settings)
        assert train is not None and len(train) == 3 * 40 and len(held_out) == 3 * 20
        assert not {*images[train]} & {*images[held_out]} and np.unique(images[train]).size == 40
    once = Cache(world / "cache").index
    assert np.array_equal(once.first_image, once.image)


def test_a_share_of_the_images_is_trained_on(world: Path, tmp_path: Path) -> None:
    """The same at every step and beside held-out ones; a smaller share is a part of a larger one."""
    cache, settings = Cache(world / "cache"), world_config(world).distill
    assert split_images(cache, settings)[0] is None
    parts = {}
    for share in (0.3, 0.6, 1.0):
        train, held_out = split_images(cache, settings.model_copy(update={"share": share, "holdout": 0.1}))
        assert train is not None and len(train) == round(90 * share) and not {*train} & {*held_out}
        parts[share] = {*train.tolist()}
    assert parts[0.3] < parts[0.6] < parts[1.0]
    run = distill(world_config(world, "distill.share=0.3", "distill.epochs=3"), world / "cache", tmp_path / "run")
    assert run.steps == 3 * 2  # 30 records in batches of 16


def test_images_are_held_out(world: Path, tmp_path: Path) -> None:
    """All views of an image are on one side; figures of the others are in the log after every epoch."""
    config = world_config(world, "distill.holdout=0.1", "distill.epochs=3", "distill.lr=3e-3")
    cache = Cache(world / "cache")
    train, held_out = split_images(cache, config.distill)
    assert train is not None and sorted([*train, *held_out]) == list(range(100)) and len(held_out) == 10
    run = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert run.steps == 3 * 6
    found = [line for line in read_log(tmp_path / "run/log.jsonl") if "held_out_loss" in line]
    assert [line["epoch"] for line in found] == [1, 2, 3]
    assert found[-1]["held_out_loss"] < found[0]["held_out_loss"]
    right = [line["held_out_knn"] / 10 for line in found]  # of ten images
    assert right == pytest.approx([round(count) for count in right], abs=1e-6)
    explained = [line["explained_variance"] for line in found]
    assert [*explained[0]] == ["2", "3"] and all(explained[-1][b] > explained[0][b] for b in explained[0])
    with pytest.raises(UserError, match="distill.holdout: all 100 images would be held out"):
        split_images(cache, config.distill.model_copy(update={"holdout": 0.999}))


def test_explained_variance_is_that_of_all_batches() -> None:
    """However the images are divided, and also of targets that are far from zero."""
    wanted = 1e3 + torch.randn(6, 5, 3)
    found = wanted + 0.5 * torch.randn(6, 5, 3)
    summed = sum(squares(wanted[rows], found[rows]) for rows in (slice(4), slice(4, 5), slice(5, 6)))
    expected = 1 - (wanted - found).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
    assert isinstance(summed, torch.Tensor) and explained_variance(summed) == pytest.approx(float(expected), rel=1e-4)
