"""Projectors against computations by hand."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import world_config
from torch.nn import functional as F

from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.training.checkpoint import read_log
from singer.errors import UserError
from singer.projectors import Lift, ProjectorSpec


@pytest.mark.parametrize(("grid", "target"), [((2, 3), (4, 5)), ((4, 4), (2, 2)), ((3, 3), (3, 3))])
@pytest.mark.parametrize("prefix", [0, 1])
def test_lift(grid: tuple[int, int], target: tuple[int, int], prefix: int) -> None:
    """It begins as interpolation, and is what its matrices say once they have moved."""
    lift = Lift(ProjectorSpec(5, grid, 7, target, prefix))
    tokens = torch.randn(2, prefix + grid[0] * grid[1], 5)
    weight, bias = (p.detach().double().numpy() for p in (lift.linear.weight, lift.linear.bias))
    maps = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    patches = F.interpolate(maps, size=target, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    expected = torch.cat([tokens[:, :prefix], patches], 1).double().numpy() @ weight.T + bias
    np.testing.assert_allclose(lift(tokens).detach().numpy(), expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        lift.mixing.normal_()
    mixed = np.einsum("ts,bsd->btd", lift.mixing.detach().double().numpy(), tokens[:, prefix:].double().numpy())
    expected = np.concatenate([tokens[:, :prefix].double().numpy(), mixed], 1) @ weight.T + bias
    np.testing.assert_allclose(lift(tokens).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_on_equal_grids_a_lift_begins_as_the_identity() -> None:
    assert torch.equal(Lift(ProjectorSpec(3, (2, 4), 5, (2, 4), 1)).mixing, torch.eye(8))


@pytest.mark.parametrize(
    ("sets", "shapes"),
    [
        (["student.patch_size=16"], {"2": (16, 4), "3": (16, 4)}),
        (["student.patch_size=4", "distill.objective={mse: 1, logits: 1}"], {"unit_projectors.3": (16, 64)}),
        (["student.name=test_convnext", "cache.token_share=0.5"], {"2": (16, 4), "3": (16, 1)}),
    ],
)
def test_students_are_lifted_to_the_teachers_grid(
    world: Path, tmp_path: Path, sets: list[str], shapes: dict[str, tuple[int, int]]
) -> None:
    """Coarser, finer, and with feature maps against sampled tokens."""
    own = [f"student.{k}=null" for k in ("dim", "depth", "heads", "patch_size")] if "name" in sets[0] else []
    config = world_config(
        world, *own, *sets, "distill.projector=lift", "distill.epochs=3", "distill.lr=3e-3", "refine.cleaner=clip"
    )
    cache, adapters = world / "cache", world / "adapters"
    if "cache.token_share=0.5" in sets:
        cache, adapters = tmp_path / "cache", tmp_path / "adapters"
        cache_teacher(config, str(world / "train" / "*.tar"), cache)
        refine(config, cache, adapters)
    distill(config, cache, tmp_path / "run", adapters)
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert len(losses) == 3 * 7 and sum(losses[-7:]) < sum(losses[:7])  # over whole epochs
    stored = safetensors.torch.load_file(tmp_path / "run" / "projectors.safetensors")
    for name, shape in shapes.items():
        assert stored[f"{name}.mixing"].shape == shape


def test_unknown_projector(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distill.projector: unknown 'lifft'; known: linear, mlp, lift"):
        distill(world_config(world, "distill.projector=lifft"), world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()
