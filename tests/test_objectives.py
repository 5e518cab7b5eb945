"""Every objective against a computation in NumPy, or by the teacher itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import WIDTH, draw_images, make_vit, seeded, world_config
from forked import forked
from torch import Tensor

from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from singer.errors import UserError
from singer.objectives import OBJECTIVES, Mixture, Objective, ObjectiveContext, Tokens
from singer.objectives.acam import Acam
from singer.objectives.angle import Angle
from singer.objectives.js import Js
from singer.objectives.logits import Logits
from singer.objectives.meal import Meal
from singer.objectives.meal_discriminator import MealDiscriminator
from singer.objectives.prototypes import Prototypes, sinkhorn
from singer.objectives.queue import Queue
from singer.objectives.relation import Relation, queries_keys_values, split
from singer.objectives.top_logits import TopLogits
from singer.objectives.zero_shot import ZeroShot
from singer.suffix import TeacherSuffix, suffix_state


def make_context(classes: int | None = 5, **args: object) -> ObjectiveContext:
    vit = make_vit(**args)
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    texts = torch.randn(7, int(vit.model.num_classes or WIDTH))
    return ObjectiveContext((2, 3), WIDTH, 1, (4, 4), suffix, vit.prefix, classes, texts)


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
        torch.testing.assert_close(objective.log_probs(kept), expected, atol=1e-5, rtol=1e-4)
        student = torch.randn_like(kept)
        ours, theirs = objective.log_probs(student).double().numpy(), expected.double().numpy()
        found = objective({3: student}, {3: kept})["kl"]
    np.testing.assert_allclose(found.numpy(), (np.exp(theirs) * (theirs - ours)).sum(-1), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "args", "prefix", "grid", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", {}, 1, (4, 4), "reads prefix tokens that the student does not have"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1, None, "reads all patches, and some are left out"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, 1, None, "reads all patches, and some are left out"),
        ("vit_tiny_patch16_224", {}, 0, (4, 4), "needs a student with a class token"),
        ("vit_tiny_patch16_224", {}, 1, None, None),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 4}, 0, (4, 4), None),
    ],
)
def test_logits_need_what_the_head_reads(
    name: str, args: dict[str, object], prefix: int, grid: tuple[int, int] | None, reason: str | None
) -> None:
    given = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5, **args}
    model = timm.create_model(name, **given)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    suffix = TeacherSuffix(name, given, 1, suffix_state(model.state_dict(), 1))
    context = ObjectiveContext((1,), 24, prefix, grid, suffix, model.num_prefix_tokens)
    if reason is None:
        Logits(context)
    else:
        with pytest.raises(UserError, match=reason):
            Logits(context)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True}),
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_queries_keys_and_values_are_those_of_the_block(
    name: str, args: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the block itself gives to its attention; rotary positions turn queries and keys, and leave their lengths."""
    torch.manual_seed(seeded(7))
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
    model = timm.create_model(name, **small, **args).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    given: list[Tensor] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        given[:] = [q, k, v]
        return attend(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    inputs: list[Tensor] = []
    attention = model.blocks[0].attn
    attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        found = split(queries_keys_values(attention, inputs[0]), attention.num_heads)
    turned = getattr(model, "rope", None) is not None
    for own, used in zip(found.values(), given, strict=True):
        x, y = (own.norm(dim=-1), used.norm(dim=-1)) if turned and used is not given[2] else (own, used)
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def probabilities(objective: Logits, tokens: Tensor) -> np.ndarray:
    return objective.log_probs(tokens).exp().detach().double().numpy()


def test_js() -> None:
    objective, student, target = Js(make_context()), draw(), draw()
    ours, theirs = probabilities(objective, student[3]), probabilities(objective, target[3])
    mean = (ours + theirs) / 2
    expected = 0.5 * (ours * np.log(ours / mean) + theirs * np.log(theirs / mean)).sum(-1)
    np.testing.assert_allclose(objective(student, target)["js"].detach().numpy(), expected, rtol=1e-3)
    assert objective(target, target)["js"].abs().max() < 1e-6


@pytest.mark.parametrize("kept", [2, 5, 100])
def test_top_logits(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(TopLogits, "kept", kept)
    objective, student, target = TopLogits(make_context()), draw(), draw()
    ours, theirs = probabilities(objective, student[3]), probabilities(objective, target[3])
    for row in theirs:
        others = np.argsort(row)[: max(0, 5 - kept)]
        row[others] = row[others].mean() if len(others) else 0.0
    expected = -(theirs * np.log(ours)).sum(-1)
    np.testing.assert_allclose(objective(student, target)["ce"].detach().numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("args", [{}, {"num_classes": 0}])
def test_zero_shot(args: dict[str, object]) -> None:
    """Embeddings of the teacher's head, or where it has none its pooled tokens, against texts."""
    context, student, target = make_context(**args), draw(), draw()
    objective = ZeroShot(context)
    assert context.texts is not None and not objective.state_dict()
    texts = context.texts.double().numpy()
    ours, theirs = (objective.output(x[3]).detach().double().numpy() for x in (student, target))

    def scores(images: np.ndarray) -> np.ndarray:
        return softmax(np.array([[cosine(i, t) for t in texts] for i in images]) / 0.01)

    a, b = scores(ours), scores(theirs)
    expected = (b * np.log(b / a)).sum(-1)
    np.testing.assert_allclose(objective(student, target)["kl"].detach().numpy(), expected, rtol=1e-3, atol=1e-9)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch and what earlier batches left; the oldest go first."""
    monkeypatch.setattr(Queue, "size", 4)
    objective = Queue(make_context())
    earlier: list[np.ndarray] = []
    for _ in range(3):
        student, target = draw(), draw()
        found = objective(student, target)
        a, b = (x[3][:, 1:].double().numpy() for x in (student, target))
        images = unit(b.mean(1))
        known = np.concatenate([images, *earlier])
        p, q = (softmax(unit(x.mean(1)) @ known.T / 0.07) for x in (a, b))
        np.testing.assert_allclose(found["images"].numpy(), (q * np.log(q / p)).sum(-1), rtol=1e-3)
        p, q = (softmax(unit(x) @ unit(x).transpose(0, 2, 1) / 0.07) for x in (a, b))
        np.testing.assert_allclose(found["patches"].numpy(), (q * np.log(q / p)).sum(-1).mean(1), rtol=1e-3)
        earlier = [np.concatenate([*earlier, images])[-4:]]
    objective.eval()
    before = objective.state_dict()["filled"].item()
    objective(draw(), draw())
    assert objective.state_dict()["filled"].item() == before == 9


def test_sinkhorn() -> None:
    scores = torch.randn(40, 8)
    assigned = sinkhorn(scores, 50).double().numpy()
    np.testing.assert_allclose(assigned.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(assigned.sum(0), 5, rtol=1e-3)
    # A plan of transport is the scores' exponential with rows and columns scaled: cross ratios stay.
    kernel = np.exp(scores.double().numpy())
    ratio = (assigned / kernel)[1:] / (assigned / kernel)[:1]
    np.testing.assert_allclose(ratio, ratio[:, :1].repeat(8, 1), rtol=1e-3)


def test_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prototypes, "count", 6)
    objective, student, target = Prototypes(make_context()), draw(), draw()
    drawn = unit(target[3][:, 1:].reshape(-1, WIDTH).double().numpy())
    objective(student, target)
    began = objective.state_dict()["patches"].double().numpy()
    # They moved by a hundredth at most, from tokens of the batch.
    assert np.all((began @ drawn.T).max(1) > 0.99) and not objective.state_dict()["cls"].isnan().any()
    objective.eval()
    found = objective(student, target)
    for kind, tokens in (("cls", slice(0, 1)), ("patches", slice(1, None))):
        prototypes = objective.state_dict()[kind].double().numpy()
        a, b = (unit(x[3][:, tokens].double().numpy()) @ prototypes.T for x in (student, target))
        wanted = sinkhorn(torch.from_numpy(b.reshape(-1, 6) / 0.07), 3).numpy().reshape(b.shape)
        expected = -(wanted * np.log(softmax(a / 0.1))).sum(-1).mean(1)
        np.testing.assert_allclose(found[kind].numpy(), expected, rtol=1e-3)
    same = objective.state_dict()["patches"].double().numpy()
    objective.train()
    objective(student, target)
    nearest = (drawn @ same.T).argmax(1)
    means = [drawn[nearest == k].mean(0) if (nearest == k).any() else same[k] for k in range(6)]
    expected = unit(0.99 * same + 0.01 * np.array(means))
    moved = objective.state_dict()["patches"].numpy()
    some = [k for k in range(6) if (nearest == k).any()]
    np.testing.assert_allclose(moved[some], expected[some], rtol=1e-3, atol=1e-5)


OF_WHOLE_BATCHES = ("angle", "prototypes", "queue")


def test_what_is_learned_from_batches_is_learned_from_the_parts_of_all_processes(tmp_path: Path) -> None:
    """Two processes with half a batch each: the losses and the buffers of one process with all of it."""
    objectives = {name: OBJECTIVES[name](make_context()) for name in OF_WHOLE_BATCHES}
    for buffer in objectives["prototypes"].buffers():  # they begin by chance
        buffer.copy_(torch.nn.functional.normalize(torch.randn(buffer.shape), dim=-1))
    torch.save({name: objective.state_dict() for name, objective in objectives.items()}, tmp_path / "start")
    batches = [(torch.randn(8, 17, WIDTH), torch.randn(8, 17, WIDTH)) for _ in range(3)]
    torch.save(batches, tmp_path / "batches")
    ranks = [forked(_half, tmp_path, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    whole = {name: [objective({3: a}, {3: b}) for a, b in batches] for name, objective in objectives.items()}
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, steps in whole.items():
        for step, losses in enumerate(steps):
            for part, values in losses.items():
                torch.testing.assert_close(torch.cat([half[name][0][step][part] for half in halves]), values)
        for half in halves:
            for key, value in objectives[name].state_dict().items():
                torch.testing.assert_close(half[name][1][key], value)


def _half(folder: Path, rank: int) -> None:
    """Write, for each objective, the losses and the state after batches of which this process has a half."""
    file = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=file, rank=rank, world_size=2)
    starts, batches = (torch.load(folder / name, weights_only=True) for name in ("start", "batches"))
    part, found = slice(4 * rank, 4 * rank + 4), {}
    for name, start in starts.items():
        objective = OBJECTIVES[name](make_context())
        objective.load_state_dict(start)
        losses = [objective({3: a[part]}, {3: b[part]}) for a, b in batches]
        found[name] = (losses, objective.state_dict())
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_weighted() -> None:
    student, target = draw((2,)), draw((2,))
    a, b = (x[2].double().numpy() for x in (student, target))
    weights = 16 * softmax(cosine(b[:, 1:], b[:, :1]) / 0.2)
    errors = ((a - b) ** 2).mean(-1)
    expected = (errors[:, 0] + (weights * errors[:, 1:]).sum(1)) / 17
    np.testing.assert_allclose(
        OBJECTIVES["weighted"](make_context())(student, target)["2"].numpy(), expected, rtol=1e-4
    )


def test_acam() -> None:
    """From its masks by hand; masks that are alike cost, and a student that is right pays for them alone."""
    objective, student, target = Acam(make_context()), draw((2,)), draw((2,))
    a, b = student[2][:, 1:], target[2][:, 1:]
    channels, patches = (m.detach().double().numpy() for m in objective.fusions["2"](a, b))
    assert channels.shape == (3, 6, WIDTH) and patches.shape == (3, 6, 16)
    error = (a - b).square().double().numpy()

    def alike(masks: np.ndarray) -> float:
        pairs = [(m, n) for m in range(6) for n in range(6) if m != n]
        x = masks
        return np.mean([2 * x[m] @ x[n] / (x[m] @ x[m] + x[n] @ x[n]) for m, n in pairs])

    expected = []
    for i in range(3):
        c, p = (m[i] / m[i].mean(-1, keepdims=True) for m in (channels, patches))
        masked = 0.5 * ((c * error[i].mean(0)).mean() + (p * error[i].mean(1)).mean())
        cls = (student[2][i, 0] - target[2][i, 0]).square().mean().item() / 17
        expected.append(masked + alike(channels[i]) + alike(patches[i]) + cls)
    np.testing.assert_allclose(objective(student, target)["2"].detach().numpy(), expected, rtol=1e-3)
    # Blocks of hierarchical teachers differ in width.
    uneven = Acam(replace(make_context(), widths={2: 12, 3: WIDTH}))
    student[2], target[2] = student[2][..., :12], target[2][..., :12]
    assert uneven(student, target)["2"].shape == (3,)


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
    "zero-shot": (replace(make_context(), texts=torch.ones(2, 9)), "have 9 channels, and the teacher's images 5"),
    "vitkd": (ObjectiveContext((2,), WIDTH, 1, None), "needs all patches of an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_objective_needs(name: str) -> None:
    context, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        OBJECTIVES[name](context)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if issubclass(kind, Logits)])
def test_what_reads_the_teachers_head_is_named_as_it_was_asked_for(name: str) -> None:
    context = replace(make_context(), prefix=0, texts=torch.ones(2, 5))
    with pytest.raises(UserError, match=f"^distill.objective {name} needs a student with a class token"):
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_depends_on_the_batch_says_so(name: str) -> None:
    """Outside of training, losses of other objectives are the same for a record alone."""
    objective, target, labels = OBJECTIVES[name](make_context()), draw(), torch.tensor([1, 0, 4])
    student = {2: student_attention(6)} if objective.own_attention else draw()
    objective(student, target, labels)  # fills a queue, and sets what is measured
    objective.eval()
    found = objective(student, target, labels)
    alone = [
        objective(*({b: x[n : n + 1] for b, x in of.items()} for of in (student, target)), labels[n : n + 1])
        for n in range(3)
    ]
    same = [torch.allclose(torch.cat([one[part] for one in alone]), x, rtol=1e-4) for part, x in found.items()]
    assert all(same) != objective.batchwise


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


def student_attention(width: int) -> Tensor:
    return torch.randn(3, 17, 3 * width)


@pytest.mark.parametrize(("name", "kinds"), [("minilm", ("qq", "kk", "vv")), ("tinymim", ("qk", "vv"))])
def test_relations_of_own_attention(name: str, kinds: tuple[str, ...]) -> None:
    """The student's Q, K and V are as narrow as it is; both sides have as many relation heads."""
    context, target = make_context(), draw()
    objective, student = OBJECTIVES[name](context), student_attention(6)
    assert context.suffix is not None and objective.own_attention and objective.reads() == (2,)
    block = context.suffix.block(3)
    mixed = block.attn.qkv(block.norm1(target[2]))  # type: ignore[union-attr,operator]

    def heads(x: Tensor) -> dict[str, np.ndarray]:
        parts = x.detach().double().numpy().reshape(3, 17, 3, 2, -1)
        return {n: parts[:, :, i].transpose(0, 2, 1, 3) for i, n in enumerate("qkv")}

    ours, theirs = heads(student), heads(mixed)
    kl = []
    for a, b in kinds:
        p, q = (softmax(x[a] @ x[b].transpose(0, 1, 3, 2) / np.sqrt(x[a].shape[-1])) for x in (ours, theirs))
        kl.append((q * np.log(q / p)).sum(-1).mean(axis=(1, 2)))
    found = objective({2: student}, target)["2"].detach().numpy()
    np.testing.assert_allclose(found, np.mean(kl, axis=0), rtol=1e-3)


def test_meal() -> None:
    """Alone it is the objective logits; among several, the KL from the mean of what all say."""
    objective, student, target = Meal(make_context()), draw(), draw()
    alone = objective(student, target)["kl"]
    torch.testing.assert_close(alone, Logits(make_context())(student, target)["kl"], atol=1e-5, rtol=1e-3)
    mean = softmax(torch.randn(3, 5).double().numpy())
    ours = probabilities(objective, student[3])
    found = objective.loss_to_mean(student, torch.from_numpy(mean).float())["kl"].detach().numpy()
    np.testing.assert_allclose(found, (mean * np.log(mean / ours)).sum(-1), rtol=1e-3)


def test_meal_discriminator() -> None:
    """Cross-entropy by hand; the discriminator learns to tell the two, and the student to be taken for its teacher."""
    objective, (tokens, target) = MealDiscriminator(make_context()), (draw(), draw())
    student = {3: tokens[3].requires_grad_()}
    found = objective(student, target)
    torch.testing.assert_close(found["kl"], Meal(make_context())(student, target)["kl"])
    layers = [m for m in objective.discriminator if isinstance(m, torch.nn.Linear)]
    weights = [[p.detach().double().numpy() for p in m.parameters()] for m in layers]

    def said(log_probs: np.ndarray) -> np.ndarray:
        x = log_probs
        for weight, bias in weights[:-1]:
            x = np.maximum(x @ weight.T + bias, 0)
        return 1 / (1 + np.exp(-(x @ weights[-1][0].T + weights[-1][1])[:, 0]))

    ours, theirs = (said(np.log(probabilities(objective, x[3]))) for x in (student, target))
    expected = -(np.log(1 - ours) + np.log(theirs)) / 2
    np.testing.assert_allclose(found["discriminator"].detach().numpy(), expected, rtol=1e-3)

    loss = found["discriminator"].sum()
    down, *learned = torch.autograd.grad(loss, [student[3], *objective.discriminator.parameters()])
    with torch.no_grad():
        step = 1e-2 / float(down.norm())
        student[3] -= step * down
        fooled = objective(student, target)["discriminator"].sum()
        for p, gradient in zip(objective.discriminator.parameters(), learned, strict=True):
            p -= 1e-2 * gradient
        assert fooled > loss and objective(student, target)["discriminator"].sum() < fooled
    assert set(objective.eval()(student, target)) == {"kl"}


def test_angle() -> None:
    """Squared angles of CLS over the teacher's own dispersion, which later batches move."""
    objective, student, target = Angle(make_context()), draw(), draw()
    a, b = (unit(x[3][:, 0].double().numpy()) for x in (student, target))
    centre = b.mean(0)

    def squared(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.arccos((x * y).sum(-1)) ** 2

    dispersion = squared(b, unit(centre)).mean()
    found = objective(student, target)["summary"].numpy()
    np.testing.assert_allclose(found, squared(a, b) / dispersion, rtol=1e-3)
    later = draw()
    c = unit(later[3][:, 0].double().numpy())
    objective(student, later)
    centre = 0.99 * centre + 0.01 * c.mean(0)
    dispersion = 0.99 * dispersion + 0.01 * squared(c, unit(centre)).mean()
    assert objective.state_dict()["dispersion"].item() == pytest.approx(dispersion, rel=1e-3)
    objective.eval()
    kept = {name: x.clone() for name, x in objective.state_dict().items()}
    np.testing.assert_allclose(objective(student, target)["summary"].numpy(), squared(a, b) / dispersion, rtol=1e-3)
    assert all(torch.equal(x, kept[name]) for name, x in objective.state_dict().items())


def test_a_lone_summary_has_no_dispersion() -> None:
    """Its angle from itself would be divided by nothing; later summaries count."""
    objective, student, target = Angle(make_context()), draw(), draw()
    one = [{b: x[:1] for b, x in tokens.items()} for tokens in (student, target)]
    first = objective(*one)["summary"]
    a, b = (unit(x[3][:, 0].double().numpy()) for x in one)
    np.testing.assert_allclose(first.numpy(), np.arccos((a * b).sum(-1)) ** 2, rtol=1e-3)
    assert objective.state_dict()["dispersion"] == 0
    assert objective(student, target)["summary"].max() < 10 and objective.state_dict()["dispersion"] > 0.1


def test_blocks_have_weights() -> None:
    """A weight counts relative to those of the blocks that an objective compares."""
    context, student, target = make_context(), draw(), draw()
    parts: dict[str, Objective] = {n: OBJECTIVES[n](context) for n in ("mse", "gram", "angle")}
    weights = {"mse": 2.0, "gram": 1.0, "angle": 1.0}
    plain = Mixture(parts, weights).eval()(Tokens(student), Tokens(target), None)
    found = Mixture(parts, weights, {2: 1.0, 3: 3.0}).eval()(Tokens(student), Tokens(target), None)
    for name, factor in (("mse.2", 0.5), ("mse.3", 1.5), ("gram.2", 0.5), ("gram.3", 1.5), ("angle.summary", 1.0)):
        torch.testing.assert_close(found[name], factor * plain[name])


def test_labels_of_one_class_teach_nothing(world: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 1, 6)
    rows = [f"{image},3" for image in sorted((tmp_path / "images").rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    config = world_config(world, "distill.objective=labels")
    cache_teacher(config, tmp_path / "list.csv", tmp_path / "cache")
    with pytest.raises(UserError, match="labels teaches nothing here: all labels of the cache are of one class"):
        distill(config, tmp_path / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()
