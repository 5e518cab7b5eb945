"""The optimisers of a student, against their definitions."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim.muon
import torch
from conftest import world_config
from torch import Tensor, nn

from pipeline.cache.reader import Cache
from pipeline.config import StudentConfig, load_config
from pipeline.students.new import new_student
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.joint_training import new_joint
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.fsdp import WholeOptimiser
from pipeline.training.optimisers import decay_groups, new_optimiser
from singer.errors import UserError
from tests.conftest import seeded

CPU = torch.device("cpu")
RATE, DECAY = 1e-2, 0.1


def model() -> nn.ModuleDict:
    """Return a student with a projector; its gradients are noise, whose rows differ in size."""
    student = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2, img_size=32, num_classes=0)
    found = nn.ModuleDict({"student": student, "projector": nn.Linear(24, 40)})
    for p in found.parameters():
        p.grad = torch.randn(p.shape) * torch.logspace(0, -1, len(p)).view(-1, *[1] * (p.dim() - 1))
    return found


def changes(optimiser: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return {weight: (its value before a step, after it, its gradient)}."""
    torch.manual_seed(seeded(5))
    trained = model()
    sets = [f"distill.optimizer={optimiser}", f"distill.weight_decay={DECAY}"]
    stepped = new_optimiser(trained, load_config(sets=sets).distill, CPU)
    for group in stepped.param_groups:
        group["lr"] = RATE
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    stepped.step()
    return {n: (before[n], p.detach(), p.grad) for n, p in trained.named_parameters() if p.grad is not None}


MATRICES = ["projector.weight", "student.blocks.0.attn.qkv.weight", "student.patch_embed.proj.weight"]


@pytest.mark.parametrize("name", MATRICES)
def test_muon_turns_all_directions_of_a_matrix_alike(name: str) -> None:
    """The first update is -0.2 · sqrt(longer side) · rate · U Vᵀ of the gradient U S Vᵀ, up to 0.4 of a direction."""
    before, after, gradient = changes("muon")[name]
    update = (after - (1 - RATE * DECAY) * before).flatten(1) / (-0.2 * RATE * max(gradient.flatten(1).shape) ** 0.5)
    u, s, vh = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert s.max() > 3 * s.min()
    turned = u.T @ update @ vh.T
    sizes = turned.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (turned - sizes.diag()).abs().max() < 0.05  # five rounds in bfloat16


@pytest.mark.parametrize("name", ["student.cls_token", "student.pos_embed", "student.norm.weight", "projector.bias"])
@pytest.mark.parametrize(("optimiser", "first"), [("muon", 1.9), ("adamw", 1.0)])
def test_the_rest_does_not_decay(optimiser: str, first: float, name: str) -> None:
    """Its first update is that of AdamW; of Muon that of NAdamW (Nesterov's), 1 + 0.9 times as large."""
    before, after, gradient = changes(optimiser)[name]
    torch.testing.assert_close(after, before - first * RATE * gradient / (gradient.abs() + 1e-8), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MATRICES)
def test_adamw_of_a_matrix(name: str) -> None:
    before, after, gradient = changes("adamw")[name]
    torch.testing.assert_close(
        after, (1 - RATE * DECAY) * before - RATE * gradient / (gradient.abs() + 1e-8), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_muon_is_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which updates are orthogonal, the state and four steps, with a weight that has no gradient in one of them."""
    exact = partial(timm.optim.muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", exact)
    torch.manual_seed(seeded(6))
    ours = nn.ModuleDict({"student": timm.create_model(name, num_classes=0), "projector": nn.Linear(3, 24)})
    theirs = copy.deepcopy(ours)
    settings = load_config(sets=[f"distill.weight_decay={DECAY}"]).distill
    groups = decay_groups(theirs, DECAY)
    for group in groups:
        group["use_fallback"] = group["weight_decay"] == 0
    both = new_optimiser(ours, settings, CPU), timm.optim.Muon(groups, nesterov=True, betas=(0.9, 0.999))
    for optimiser in both:
        for group in optimiser.param_groups:
            group["lr"] = RATE
    before = [p.detach().clone() for p in ours.parameters()]
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for step in range(4):
        for own, other in pairs:
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        if step == 2:
            pairs[-2][0].grad = pairs[-2][1].grad = None
        gradients = [own.grad for own, _ in pairs]
        for optimiser in both:
            optimiser.step()
        assert all(own.grad is gradient for (own, _), gradient in zip(pairs, gradients, strict=True))
    states, expected = (optimiser.state_dict()["state"] for optimiser in both)
    assert {key: state.keys() for key, state in states.items()} == {
        key: state.keys() for key, state in expected.items()
    }
    assert {key: state["use_muon"] for key, state in states.items()} == {k: s["use_muon"] for k, s in expected.items()}
    assert 0 < sum(state["use_muon"] for state in states.values()) < len(pairs)
    for (own, other), first in zip(pairs, before, strict=True):
        assert not torch.equal(own, first)
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


# Weight decay


def grouped(distiller: Distiller) -> tuple[set[str], set[str]]:
    """Names of what decays, and of what is trained without."""
    names = {id(p): name for name, p in distiller.named_parameters()}
    kept: dict[bool, set[str]] = {True: set(), False: set()}
    for group in decay_groups(distiller, 0.1):
        assert group["weight_decay"] in (0, 0.1)
        kept[group["weight_decay"] > 0] |= {names[id(p)] for p in group["params"]}
    return kept[True], kept[False]


@pytest.mark.parametrize(
    ("student", "spared"),
    [
        ("vit_tiny_patch16_224", {"student.pos_embed", "student.cls_token", "student.blocks.0.norm1.weight"}),
        ("vit_small_patch14_reg4_dinov2", {"student.reg_token", "student.blocks.0.ls1.gamma"}),
        ("test_convnext", {"student.stages.0.blocks.0.conv_dw.bias"}),
        ("fastvit_t8", {"student.stages.0.blocks.0.layer_scale.gamma"}),
    ],
)
def test_what_decays(world: Path, student: str, spared: set[str]) -> None:
    """Matrices of the student, projectors and adapters; no vectors, tokens, positions or scales."""
    cache = Cache(world / "cache")
    # The blocks that are matched are the last ones, so that all is trained.
    backbone = new_student(StudentConfig(name=student, image_size=56 if "14" in student else 64), 64)
    joint = new_joint(cache, world_config(world).refine, CPU)
    blocks = len(backbone.layout)
    targets = Targets(cache, None, backbone, CPU)
    head = TeacherBranch(backbone, {2: blocks - 2, 3: blocks - 1}, targets, Teaching({"mse": 1.0, "vitkd": 1.0}), joint)
    distiller = Distiller(backbone, [head])
    decays, others = grouped(distiller)
    assert decays | others == {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert not decays & others and spared <= others
    sizes = {name: p.shape for name, p in distiller.named_parameters()}
    for name in decays:
        assert len(sizes[name]) > 1, name
        assert not name.endswith(("bias", "_token", "pos_embed", "gamma"))
    assert any("projectors" in name for name in decays) and any("mask_token" in name for name in others)
    assert {name for name in sizes if name.startswith("adapters.")} <= decays


def test_positions_of_a_table_do_not_decay(world: Path) -> None:
    """What an architecture names, here Swin's table of relative positions."""
    swin = new_student(StudentConfig(name="swin_tiny_patch4_window7_224", image_size=224), 224)
    head = TeacherBranch(swin, {2: 2, 3: 3}, Targets(Cache(world / "cache"), None, swin, CPU), Teaching({"mse": 1.0}))
    decays, others = grouped(Distiller(swin, [head]))
    assert any(n.endswith("relative_position_bias_table") for n in others)
    assert not any(n.endswith("relative_position_bias_table") for n in decays)


def test_a_run_of_one_group_is_not_continued(world: Path) -> None:
    """A checkpoint from before decay was grouped: torch would load its moments, and change its decay in silence."""
    student = new_student(world_config(world).student, 32)
    head = TeacherBranch(
        student, {2: 1, 3: 2}, Targets(Cache(world / "cache"), None, student, CPU), Teaching({"mse": 1.0})
    )
    distiller = Distiller(student, [head])
    trained = [p for p in distiller.parameters() if p.requires_grad]

    def state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        for p in trained:
            p.grad = torch.ones_like(p)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return WholeOptimiser(distiller, optimiser).state_dict()

    def new() -> torch.optim.Optimizer:
        return torch.optim.AdamW(decay_groups(distiller, 0.5), lr=0.1)

    again = new()
    WholeOptimiser(distiller, again).load_state_dict(state(new()))
    assert [g["weight_decay"] for g in again.param_groups] == [0, 0.5] and len(again.state) == len(trained)
    with pytest.raises(UserError, match="it was made by another version of singer; start the run anew"):
        WholeOptimiser(distiller, new()).load_state_dict(state(torch.optim.AdamW(trained, weight_decay=0.5)))
