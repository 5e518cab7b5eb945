"""Masked patches: which they are, their loss by hand, runs with them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import seeded, world_config
from torch import Tensor

from pipeline.cache import Cache
from pipeline.data import ImageFile, list_images, relocate
from pipeline.data.sampler import BatchIndices
from pipeline.planning.quick_costs import measure_costs
from pipeline.runtime.devices import make_accelerator
from pipeline.stages.distill import distill
from pipeline.storage.tensors import read_tensors
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.run_log import read_log
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.objectives import OBJECTIVES, ObjectiveContext
from singer.patch_masks import PatchMasks, only_masked

MASKED = ("student.patch_size=4", "distill.mask_share=0.25", "distill.mask_weight=0.5")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_token_takes_the_place_of_a_share_of_the_patches(dynamic: bool) -> None:
    """It has the position of the patch; nothing is masked otherwise, and the model has no weights of it."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, dynamic_img_size=dynamic
    )
    names, images = {*model.state_dict()}, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seeded(0)))
    whole = model.patch_embed(images)
    masks = PatchMasks(model, 0.3)
    assert {*model.state_dict()} == names and torch.equal(model.patch_embed(images), whole)
    masks.active = True
    torch.manual_seed(seeded(3))
    patches = model.patch_embed(images).reshape(3, 16, 24)
    assert masks.masked is not None and masks.masked.sum(1).tolist() == [5, 5, 5] and masks.rarity == 16 / 5
    assert not torch.equal(masks.masked[0], masks.masked[1])
    assert torch.equal(patches[masks.masked], masks.mask_token.expand(15, -1))
    assert torch.equal(patches[~masks.masked], whole.reshape(3, 16, 24)[~masks.masked])


def test_only_masked_patches_are_compared() -> None:
    generator = torch.Generator().manual_seed(seeded(1))
    student, target = torch.randn(2, 3, 6, 8, generator=generator).unbind(0)
    masked = torch.rand(3, 5, generator=generator) < 0.5
    moved = student.clone().requires_grad_()
    wanted = only_masked(target, moved, masked)
    assert not wanted.requires_grad and torch.equal(wanted[:, 1:][masked], target[:, 1:][masked])
    (wanted - moved).square().sum().backward()
    assert moved.grad is not None and not moved.grad[:, 0].any()
    assert torch.equal(moved.grad[:, 1:].abs().sum(-1) > 0, masked)


def made(world: Path, out: Path, *sets: str) -> tuple[NewStudent, Batch, dict[int, Tensor]]:
    """Return a student in training, a batch of six records, and their stored features."""
    config = world_config(world, *MASKED, *sets)
    sources = open_teachers(config.distill, world / "cache", None)
    new = NewStudent(StudentSpec(config, out), sources, make_accelerator("no"))
    records = np.arange(0, 12, 2)
    with ImageFile(relocate(sources[0].cache.index.images, None)) as files:
        load = BatchLoader([sources[0].cache], files, [32])
        (batch,) = load([[BatchIndices(records, np.full(6, 1 / 6, np.float32))]], 1)
    new.distiller.train()
    if new.distiller.dropout is not None:
        new.distiller.dropout.share = 0.5
    return new, batch, sources[0].cache.features(records, torch.device("cpu"))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_losses_are_of_the_teachers_tokens_at_masked_patches(world: Path, tmp_path: Path, share: float) -> None:
    """By hand: the second pass of the student, its masked patches that are kept, the mean by the share."""
    new, batch, features = made(world, tmp_path / "run", f"distill.token_share={share}")
    learner, branch = new.distiller, new.distiller.branches[0]
    assert learner.masks is not None
    torch.manual_seed(seeded(2))
    losses, _ = learner(batch)
    assert not learner.masks.active  # in the next step, it sees all at first
    torch.manual_seed(seeded(2))
    images, expected = learner.images(batch), {}
    for pass_ in ("", "masked."):
        learner.masks.active = bool(pass_)
        outputs = block_outputs(new.student.model, images, learner.blocks)
        kept = learner.dropout.kept if learner.dropout is not None else None
        assert (kept is None) == (share == 1)
        wanted = branch.targets.target_tokens(features, None, kept)
        for block, x in branch.tokens(outputs, None, kept).normalised.items():
            errors = (x - wanted[block]).square().mean(-1)
            if pass_:
                masked = learner.masks.masked
                assert masked is not None and masked.sum() == 6 * 16
                masked = masked if kept is None else masked.gather(1, kept)
                errors = torch.cat([torch.zeros(6, 1), errors[:, 1:] * masked], 1) * 0.5 / 0.25
            expected[f"{pass_}mse.{block}"] = errors.mean().item() / 2
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)
    learner.eval()
    learner.masks.active = False
    assert learner(batch)[0].keys() == {name for name in expected if not name.startswith("masked.")}


def test_proteus_has_three_losses_of_equal_weight(world: Path, tmp_path: Path) -> None:
    """CLS and all tokens of what it sees, and all tokens of what is masked; only the last block counts."""
    sets = ("distill.objective=proteus", "distill.mask_weight=1", "distill.token_share=1")
    new, batch, features = made(world, tmp_path / "run", *sets)
    losses, _ = new.distiller(batch)
    last = max(features)
    outputs = block_outputs(new.student.model, new.distiller.images(batch), new.distiller.blocks)
    tokens = new.distiller.branches[0].tokens(outputs, None).normalised
    assert tokens.keys() == {last}
    target = new.distiller.branches[0].targets.target_tokens({last: features[last]}, None)[last]
    errors = (tokens[last] - target).square().mean(2)
    assert losses["proteus.cls"].item() == pytest.approx(errors[:, 0].mean().item() / 2, rel=1e-4)
    assert losses["proteus.tokens"].item() == pytest.approx(errors.mean().item() / 2, rel=1e-4)
    assert losses["masked.proteus.cls"].item() == 0 < losses["masked.proteus.tokens"].item()
    alone = OBJECTIVES["proteus"](ObjectiveContext((last,), 8, 0, (8, 8)))
    assert alone({last: tokens[last]}, {last: target}).keys() == {"tokens"}


def test_training_is_the_same_in_parts_and_leaves_no_mask_in_the_student(world: Path, tmp_path: Path) -> None:
    """The random numbers differ, since parts draw one after the other, so the losses agree roughly."""
    losses = []
    for parts in (1, 2):
        config = world_config(world, *MASKED, f"distill.accumulate={parts}", "distill.holdout=0.2", "distill.epochs=2")
        run = distill(config, world / "cache", tmp_path / str(parts), world / "adapters")
        lines = read_log(tmp_path / str(parts) / "log.jsonl")
        assert {"masked.mse.2", "mse.2"} <= lines[-1]["parts"].keys()
        losses.append([line["loss"] for line in lines])
        timm.create_model(f"local-dir:{run.student}", pretrained=True)
        assert "masks.mask_token" in read_tensors(tmp_path / str(parts) / "projectors.safetensors")
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    # A later run may choose images by the loss of this one, which is that of what it sees.
    sets = ("distill.share=0.5", "distill.share_by=loss", f"distill.share_run={tmp_path / '1'}", "distill.epochs=1")
    distill(world_config(world, *MASKED, *sets), world / "cache", tmp_path / "chosen", world / "adapters")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["distill.objective=gram"],
            "mask_share: objective gram does not compare token by token, .* set distill.mask_share=0",
        ),
        (["student.name=test_resnet"], "mask_share: singer cannot mask patches of a ResNet; set it to 0"),
    ],
)
def test_what_cannot_be_masked_is_refused(world: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    shape = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")] if "student" in sets[0] else []
    config = world_config(world, "distill.mask_share=0.5", *sets, *shape)
    with pytest.raises(UserError, match=message):
        distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert not (tmp_path / "run").exists()
    if shape:  # `run` says so before it makes a cache
        with pytest.raises(UserError, match=message):
            measure_costs(config, list_images(config, str(world / "train" / "*.tar")), torch.device("cpu"))


def test_a_cache_of_some_patches_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(Cache(world / "cache").manifest), "sampled", property(lambda manifest: True))
    with pytest.raises(UserError, match="mask_share: .* holds only some of the patches .* set distill.mask_share=0"):
        distill(world_config(world, *MASKED), world / "cache", tmp_path / "run")
