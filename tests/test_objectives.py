"""Every objective against a computation in NumPy, or by the teacher itself."""

import numpy as np
import pytest
import torch
from conftest import WIDTH, make_vit
from torch import Tensor

from singer.errors import UserError
from singer.objectives import OBJECTIVES, Mixture, Objective, ObjectiveContext, Tokens
from singer.objectives.logits import Logits
from singer.objectives.relation import Relation
from singer.suffix import TeacherSuffix, suffix_state


def make_context(classes: int | None = 5, **args: object) -> ObjectiveContext:
    vit = make_vit(**args)
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    return ObjectiveContext((2, 3), WIDTH, 1, (4, 4), suffix, vit.prefix, classes)


def draw(blocks: tuple[int, ...] = (2, 3)) -> dict[int, Tensor]:
    return {b: torch.randn(3, 17, WIDTH) for b in blocks}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def smooth_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    error = np.abs(a - b)
    return np.where(error < 1, 0.5 * error**2, error - 0.5).mean(-1)


def expected_token_loss(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(B, N, d) -> (B,)"""
    token = {
        "smooth-l1": lambda: smooth_l1(a, b),
        "theia": lambda: 0.9 * (1 - cosine(a, b)) + 0.1 * smooth_l1(a, b),
        "unic": lambda: 1 - cosine(a, b) + smooth_l1(a, b),
    }[name]()
    if name == "unic":
        return 0.5 * (token[:, 0] + token[:, 1:].mean(1))
    return token.mean(1)


@pytest.mark.parametrize("name", ["smooth-l1", "theia", "unic"])
def test_token_losses(name: str) -> None:
    student, target = draw(), draw()
    found = OBJECTIVES[name](make_context())(student, target)
    for block in (2, 3):
        expected = expected_token_loss(name, student[block].double().numpy(), target[block].double().numpy())
        np.testing.assert_allclose(found[str(block)].numpy(), expected, rtol=1e-4)


def test_without_cls_all_tokens_are_patches() -> None:
    context = ObjectiveContext((2,), WIDTH, 0, (4, 4))
    a, b = torch.randn(3, 16, WIDTH), torch.randn(3, 16, WIDTH)
    found = OBJECTIVES["unic"](context)({2: a}, {2: b})["2"].double().numpy()
    x, y = a.double().numpy(), b.double().numpy()
    np.testing.assert_allclose(found, (1 - cosine(x, y) + smooth_l1(x, y)).mean(1), rtol=1e-4)


def test_gram() -> None:
    student, target = draw((2,)), draw((2,))
    a, b = (x[2][:, 1:].double().numpy() for x in (student, target))
    expected = [
        np.mean([(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i in range(16) for j in range(16)])
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(OBJECTIVES["gram"](make_context())(student, target)["2"].numpy(), expected, rtol=1e-3)


def test_relation() -> None:
    """By hand from the frozen block's weights; only the block with one after it counts."""
    context, student, target = make_context(), draw(), draw()
    found = Relation(context)(student, target)
    assert list(found) == ["2"] and context.suffix is not None
    block = context.suffix.block(3)
    weight, bias = (getattr(block.attn.qkv, n).detach().double().numpy() for n in ("weight", "bias"))

    def relations(tokens: Tensor) -> list[np.ndarray]:
        x = block.norm1(tokens).detach().double().numpy()
        mixed = (x @ weight.T + bias).reshape(3, 17, 3, 2, WIDTH // 2)
        parts = {n: mixed[:, :, i].transpose(0, 2, 1, 3) for i, n in enumerate("qkv")}
        return [softmax(a @ a.transpose(0, 1, 3, 2) / np.sqrt(WIDTH // 2)) for a in parts.values()]

    kl = [
        (theirs * np.log(theirs / ours)).sum(-1).mean(axis=(1, 2))
        for ours, theirs in zip(relations(student[2]), relations(target[2]), strict=True)
    ]
    np.testing.assert_allclose(found["2"].detach().numpy(), np.mean(kl, axis=0), rtol=1e-3, atol=1e-7)
    attention = Relation(context).heads(target[2], 2)
    torch.testing.assert_close(
        attention["q"], block.attn.qkv(block.norm1(target[2]))[..., :WIDTH].unflatten(-1, (2, -1)).transpose(1, 2)
    )


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"global_pool": "avg"}])
def test_logits_are_the_teachers_own(args: dict[str, object]) -> None:
    """The head reads CLS or pools patches; registers, which students lack, do not matter."""
    vit = make_vit(**args)
    images = torch.randn(2, 3, 32, 32)
    context = make_context(**args)
    from singer.backbones import block_outputs

    with torch.no_grad():
        expected = vit.model(images).log_softmax(-1)
        tokens = block_outputs(vit.model, images, [3])[3]
        kept = torch.cat([tokens[:, :1], tokens[:, vit.prefix :]], dim=1)
        objective = Logits(context)
        torch.testing.assert_close(objective.verdict(kept), expected, atol=1e-5, rtol=1e-4)
        student = torch.randn_like(kept)
        ours, theirs = objective.verdict(student).double().numpy(), expected.double().numpy()
        found = objective({3: student}, {3: kept})["kl"]
    np.testing.assert_allclose(found.numpy(), (np.exp(theirs) * (theirs - ours)).sum(-1), rtol=1e-3)


def test_labels() -> None:
    objective, student = OBJECTIVES["labels"](make_context()), draw()
    labels = torch.tensor([4, -1, 0])
    found = objective(student, {}, labels)["ce"]
    scores = softmax(objective.head(student[3][:, 0]).detach().double().numpy())  # type: ignore[operator]
    expected = [-np.log(scores[0, 4]), 0, -np.log(scores[2, 0])]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)


REFUSED = {
    "labels": (make_context(classes=None), "needs a cache of labelled images"),
    "logits": (make_context(num_classes=0), "needs the teacher's last block in the cache, and a head"),
    "vitkd": (ObjectiveContext((2,), WIDTH, 1, None), "needs all patches of an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_objective_needs(name: str) -> None:
    context, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](context)


def test_relation_needs_a_block_behind() -> None:
    whole = make_context()
    with pytest.raises(UserError, match="cache an intermediate one"):
        Relation(ObjectiveContext((3,), WIDTH, 1, (4, 4), whole.suffix))


def test_frozen_parts_are_nobodys_parameters() -> None:
    for name, objective in OBJECTIVES.items():
        made = objective(make_context())
        assert not any("suffix" in n for n in made.state_dict()), name
        assert all(p.requires_grad for p in made.parameters()), name


def test_mixture() -> None:
    context, student, target = make_context(), draw(), draw()
    parts: dict[str, Objective] = {n: OBJECTIVES[n](context) for n in ("mse", "relation")}
    mixture = Mixture(parts, {"mse": 2.0, "relation": 0.5})
    assert (mixture.reads(in_teacher_units=False), mixture.reads(in_teacher_units=True)) == ((2, 3), (2,))
    raw = draw()
    found = mixture(Tokens(student, raw), Tokens(target, target), None)
    assert set(found) == {"mse.2", "mse.3", "relation.2"}
    torch.testing.assert_close(found["mse.2"], parts["mse"](student, target)["2"])  # 2 · half
    torch.testing.assert_close(found["relation.2"], 0.5 * parts["relation"](raw, target)["2"])
