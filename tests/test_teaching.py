"""How a student is taught by one or several teachers: its own attention, fused blocks, mean soft targets, dropping."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from conftest import WIDTH, make_batch, run_singer, seeded, world_config
from test_objectives import make_context

from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.config import load_config
from pipeline.data.views import normalise
from pipeline.models.backbone import Backbone
from pipeline.stages.distill import distill
from pipeline.students.new import new_student
from pipeline.sweeps.run import sweep
from pipeline.training.batch import Batch
from pipeline.training.distilling.distiller import Distiller, teacher_shares
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching, attention_of
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.objectives import Mixture, Tokens
from singer.objectives.meal import Meal
from singer.projectors import ProjectorSpec, Review

CPU = torch.device("cpu")


def test_the_students_own_attention_learns(world: Path) -> None:
    """Relations are those of its block after the matched one; of that block only norm1 and qkv are trained."""
    student, cache = new_student(world_config(world).student, 32), Cache(world / "cache")
    branch = TeacherBranch(student, {2: 1, 3: 2}, Targets(cache, None, student, CPU), Teaching({"minilm": 1.0}))
    model = Distiller(student, [branch])
    assert branch.links == {2: 1} and model.blocks == [1] and [*branch.trained] == ["objective"]
    batch = Batch(
        {32: torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)},
        [Decoded(cache.features([0, 1], CPU))],
        torch.full((2,), 0.5),
        torch.zeros(2),
    )
    (found, _), inner = model(batch), student.model.blocks[2]
    tokens = block_outputs(student.model, normalise(batch.pixels[32], student.mean, student.std), [1])[1]
    seen = Tokens(attention={2: inner.attn.qkv(inner.norm1(tokens))})
    wanted = Tokens(cleaned={2: cache.features([0, 1], CPU)[2]})
    torch.testing.assert_close(found["minilm.2"], branch.objective(seen, wanted, None)["minilm.2"].mean())
    found["minilm.2"].backward()
    trained = {name for name, p in inner.named_parameters() if p.grad is not None}
    assert trained == {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias"}
    assert {name for name, p in inner.named_parameters() if p.requires_grad} == trained


def test_attention_needs_blocks_with_qkv(world: Path) -> None:
    student = new_student(world_config(world, "student.depth=1").student, 32)
    targets = Targets(Cache(world / "cache"), None, student, CPU)
    with pytest.raises(UserError, match=r"need a student with two blocks or more that have norm1 and attn\.qkv"):
        TeacherBranch(student, {2: 0}, targets, Teaching({"minilm": 1.0}))
    # These norm after each branch: their attention reads the tokens themselves.
    small: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}
    name = "vit_relpos_small_patch16_rpn_224"
    post_norm = Backbone(timm.create_model(name, **small), name, small, 32, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match=r"norm1 and attn\.qkv, in this order"):
        attention_of(post_norm, 1)


def test_an_attention_below_the_last_block_is_trained_whole(world: Path) -> None:
    """The projection of a block whose queries are compared stays trained where other losses reach it."""
    student = new_student(world_config(world, "student.depth=4").student, 32)
    targets = Targets(Cache(world / "cache"), None, student, CPU)
    branch = TeacherBranch(student, {2: 1, 3: 3}, targets, Teaching({"minilm": 1.0, "mse": 1.0}))
    model = Distiller(student, [branch])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"student.blocks.2.attn.{name}" for name in ("qkv.weight", "proj.weight", "proj.bias")} <= trained


def two_branches(world: Path, objective: str, drop: float = 0.0) -> tuple[Distiller, Batch]:
    """A student of two teachers, which have the same head and other features, and a batch."""
    student, cache = new_student(world_config(world).student, 32), Cache(world / "cache")
    targets, matching = Targets(cache, None, student, CPU), {2: 1, 3: 2}
    branches = [
        TeacherBranch(student, matching, targets, Teaching({objective: 1.0}, weight=weight, name=name))
        for name, weight in (("a", 1.5), ("b", 0.5))
    ]
    shown = [Decoded(cache.features(records, CPU)) for records in ([0, 1], [2, 3])]
    batch = make_batch(shown, 2)
    return Distiller(student, branches, drop), batch


@pytest.mark.parametrize("objective", ["meal", "meal-discriminator"])
def test_teachers_that_agree_teach_the_same(world: Path, objective: str) -> None:
    """The student of two teachers learns their mean class probabilities, weighted, from both."""
    model, batch = two_branches(world, objective)
    found, _ = model.eval()(batch)
    (a, b), suffix = model.branches, Cache(world / "cache").suffix()
    probabilities = [suffix.logits(x.blocks[3], 3).softmax(-1) for x in batch.features]
    common = (0.75 * probabilities[0] + 0.25 * probabilities[1]).detach()
    outputs = block_outputs(model.student, model.images(batch), model.blocks)
    for branch, weight in ((a, 1.5), (b, 0.5)):
        tokens = branch.tokens(outputs, None)
        learned = suffix.logits(tokens.cleaned[3], 3).log_softmax(-1)
        wanted = (common * (common.log() - learned)).sum(-1).mean() * weight
        (loss,) = (x for name, x in found.items() if name.startswith(f"{branch.name}."))
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)


def test_shares_are_those_of_each_teacher(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = two_branches(world, "mse", drop=0.5)
    monkeypatch.setattr(
        "pipeline.training.distilling.distiller.teacher_shares", lambda *_: torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    )
    found, none = model.train()(batch)
    plain, errors = model.eval()(batch)
    assert not none and errors.keys() == {"a.2", "a.3", "b.2", "b.3", "tokens"}
    assert all(x.item() == 0 for name, x in found.items() if name.startswith("b."))
    for name in (n for n in found if n.startswith("a.")):
        torch.testing.assert_close(found[name], 2 * plain[name])


def test_attention_after_the_last_block_is_that_of_the_last(world: Path) -> None:
    student, cache = new_student(world_config(world).student, 32), Cache(world / "cache")
    branch = TeacherBranch(student, {2: 2}, Targets(cache, None, student, CPU), Teaching({"minilm": 1.0}))
    assert branch.links == {2: 1}


def test_review_goes_on_with_what_is_fused() -> None:
    """Of three blocks, the shallowest also depends on the deepest."""
    review = Review({block: ProjectorSpec((5,), 7, 1) for block in (1, 2, 3)})
    tokens = {block: [torch.randn(2, 17, 5)] for block in (1, 2, 3)}
    before = review(tokens, None)[1]
    assert not torch.allclose(before, review({**tokens, 3: [torch.randn(2, 17, 5)]}, None)[1])


def test_review_fuses_deeper_blocks() -> None:
    """By hand: gates of each token mix what is fused so far into the next shallower block, on its grid."""
    review = Review({1: ProjectorSpec((5,), 7, 1), 3: ProjectorSpec((6,), 8, 1)}).double()
    shallow, deep = torch.randn(2, 17, 5).double(), torch.randn(2, 5, 6).double()
    found = review({1: [shallow], 3: [deep]}, {1: (4, 4), 3: (2, 2)})
    below = review.enter["3"](deep)
    torch.testing.assert_close(found[3], review.leave["3"](below))
    patches = below[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    wide = torch.nn.functional.interpolate(patches, size=(4, 4), mode="bilinear", antialias=True)
    below = torch.cat([below[:, :1], wide.flatten(2).transpose(1, 2)], dim=1)
    own = review.enter["1"](shallow)
    gates = 1 / (1 + torch.exp(-review.gates["1"](torch.cat([own, below], dim=-1))))
    torch.testing.assert_close(found[1], review.leave["1"](gates[..., :1] * own + gates[..., 1:] * below))


def test_dropping_keeps_the_worst_teacher() -> None:
    """Without luck only the worst counts; all shares together are as large as without dropping."""
    losses = torch.tensor([[1.0, 5.0, 2.0, 0.1], [4.0, 1.0, 1.0, 0.2], [2.0, 2.0, 3.0, 0.0]])
    found = [{"a": 0.25 * row, "b": 0.75 * row} for row in losses]
    assert teacher_shares(found, 1.0).tolist() == [[0, 3, 0, 0], [3, 0, 0, 3], [0, 0, 3, 0]]
    # All parts count: the last teacher has the largest sum.
    parts = [{"a": torch.tensor([3.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([2.0])}]
    assert teacher_shares(parts, 1.0).tolist() == [[0], [2]]
    drawn = torch.stack([teacher_shares(found, 0.5) for _ in range(300)])
    torch.testing.assert_close(drawn.sum((1, 2)), torch.full((300,), 12.0))
    kept = (drawn > 0).float().mean(0)
    assert bool((kept[losses == losses.amax(0)] == 1).all())
    assert bool(((kept[losses < losses.amax(0)] - 0.5).abs() < 0.15).all())


def test_soft_targets_of_teachers_are_averaged() -> None:
    """The mean of their probabilities, by their weights; heads of other classes are refused."""
    heads = [Meal(make_context()), Meal(make_context(seed=1)), Meal(make_context(num_classes=4))]
    tokens = [torch.randn(3, 17, WIDTH) for _ in heads]
    targets = [Tokens(cleaned={3: x}) for x in tokens]
    branches = [
        SimpleNamespace(weight=weight, objective=Mixture({"meal": head}, {"meal": 1.0}))
        for weight, head in zip((0.75, 0.25, 1.0), heads, strict=True)
    ]

    def mean(count: int) -> Any:
        distiller = cast("Distiller", SimpleNamespace(branches=branches[:count]))
        return Distiller.mean_soft_targets(distiller, targets[:count])

    said = [head.log_probs(x).exp().double().numpy() for head, x in zip(heads, tokens, strict=True)]
    np.testing.assert_allclose(mean(2)["meal"].numpy(), 0.75 * said[0] + 0.25 * said[1], rtol=1e-4)
    with pytest.raises(UserError, match="the teachers' heads have 5 and 5 and 4 classes"):
        mean(3)


def test_each_teacher_has_its_own_objective(world: Path, tmp_path: Path) -> None:
    """Features of one cache and relations of the other, as in Hybrid Distillation; a list must fit the caches."""
    objective = "distill.objective=[smooth-l1, {tinymim: 0.5}]"
    more = ("distill.teacher_drop=0.5", "distill.projector=review", "distill.epochs=1", "distill.warmup_epochs=0")
    caches = [world / "cache", world / "cache"]
    result = distill(world_config(world, objective, *more), caches, tmp_path / "run")
    assert [link.matching for link in result.teachers] == [{2: 1, 3: 2}, {2: 1}]
    with pytest.raises(UserError, match="unknown 'nothing'"):
        distill(world_config(world, "distill.objective=[mse, nothing]"), caches, tmp_path / "other")


def test_a_weight_for_each_block(world: Path) -> None:
    student = new_student(world_config(world).student, 32)
    targets = Targets(Cache(world / "cache"), None, student, CPU)
    weights = load_config(sets=["distill.block_weights=[0.1,1]"]).distill.weights_of((2, 3))
    branch = TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1.0}, block_weights=weights))
    assert branch.objective.block_weights == {"2": 0.1, "3": 1}


def test_weights_of_other_blocks_are_refused_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong, out = "distill.block_weights=[1]", tmp_path / "out"
    message = r"distill\.block_weights: 1 weights for 2 blocks; give one for each of {}"
    monkeypatch.setattr("pipeline.training.distilling.new_distiller.new_student", None)
    with pytest.raises(UserError, match=message.format("2, 3")):
        distill(world_config(world, wrong), world / "cache", out)
    with pytest.raises(UserError, match=r"distill\.objective: 2 given for 1 --cache"):
        distill(world_config(world, "distill.objective=[mse, mse]"), world / "cache", out)
    # The configuration alone shows it, if it names the blocks.
    with pytest.raises(UserError, match=message.format("8, 11")):
        load_config(sets=[wrong, "distill.blocks=[11,8]"])
    words = ["run", world / "images" / "train", "--out", out, "--student", "test_vit", "--set", "cache.blocks=[-2,-1]"]
    assert run_singer(monkeypatch, *words, "--set", wrong) == 2
    assert re.search(message.format("-2, -1"), capfd.readouterr().err)
    (tmp_path / "s.yaml").write_text("base: {distill: {block_weights: [1]}}\nruns: [{name: one}]")
    with pytest.raises(UserError, match=f"run one: {message.format('2, 3')}"):
        sweep(tmp_path / "s.yaml", world / "cache", out)
    assert not out.exists()


def test_several_teachers_teach_the_same_masked_patches(world: Path) -> None:
    """By hand: one second pass, its masked patches against each teacher's tokens, by the teachers' weights."""
    model, batch = two_branches(world, "mse")
    model.mask_patches(0.5, 3.0)
    assert model.masks is not None
    torch.manual_seed(seeded(7))
    losses, _ = model(batch)
    torch.manual_seed(seeded(7))
    model.masks.active = True
    outputs = block_outputs(model.student, model.images(batch), model.blocks)
    masked = model.masks.masked
    assert masked is not None and masked.sum(1).tolist() == [masked.shape[1] // 2] * 2
    for branch, features, weight in zip(model.branches, batch.features, (1.5, 0.5), strict=True):
        assert isinstance(features, Decoded)
        wanted = branch.targets.target_tokens(features.blocks, None)
        for block, x in branch.tokens(outputs, None).normalised.items():
            errors = (x - wanted[block]).square().mean(-1)[:, 1:] * masked
            expected = weight * 3.0 * 2 * (errors.sum(1) / x.shape[1] * batch.weights).sum().item() / 2
            assert losses[f"{branch.name}.masked.mse.{block}"].item() == pytest.approx(expected, rel=1e-4)
