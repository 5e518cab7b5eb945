"""The optimisers of a student, against their definitions."""

import copy
from functools import partial

import pytest
import timm
import timm.optim.muon
import torch
from torch import Tensor, nn

from pipeline.config import load_config
from pipeline.training.optimisers import new_optimiser
from pipeline.training.parameter_groups import decay_groups
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
