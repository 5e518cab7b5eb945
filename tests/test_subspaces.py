"""Curvature, subspaces and closed-form refiners, each against an independent computation."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import WIDTH, make_vit, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singer.artifacts import BlockScale, neighbour_mean
from singer.cleaners import CLEANERS, BlockSpec, GatedAdapter, Neighbour, NullSpaceProjector
from singer.curvature import READERS, curvature, readers_of
from singer.diagnostics import artifact_direction, artifact_map, loss_share, norm_quantiles, reader_drift, splice
from singer.errors import UserError
from singer.fit_context import FitContext
from singer.normalisers import NORMALISERS, Moments, PhiS, hadamard
from singer.refiner import Refiner
from singer.subspaces import BASES, artifact, artifact_aware, best_rank, mlp_product
from singer.suffix import TeacherSuffix, find_suffix, suffix_state

ARCHITECTURES = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "parallel": ("vit_small_patch16_18x2_224", {}),
    "gated": ("vit_giant_patch14_dinov2", {"img_size": 32}),
}


def make_context(kind: str = "plain", block: int = 2, count: int = 40, artifacts: bool = True) -> FitContext:
    """Random features of a small random teacher; in every image patch 5 is an artifact along channels 3 and 4."""
    architecture, args = ARCHITECTURES[kind]
    vit = make_vit(architecture, **args)
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    generator = torch.Generator().manual_seed(seeded(1))
    x = torch.randn(count, vit.prefix + 16, WIDTH, generator=generator)
    if artifacts:
        x[:, vit.prefix + 5, 3] += 60
        x[:, vit.prefix + 5, 4] += 30
    return FitContext(suffix, block, x, BlockScale(WIDTH**0.5, 3 * WIDTH**0.5), vit.prefix, (4, 4))


def exact_curvature(context: FitContext, reader: str) -> np.ndarray:
    """E[JᵀJ] over the clean patch tokens, from whole Jacobians."""
    total, count = np.zeros((WIDTH, WIDTH)), 0
    for image, clean in zip(context.tokens, context.clean, strict=True):
        read = READERS[reader]

        def output(tokens: Tensor, read: object = read) -> Tensor:
            return read(context.suffix, tokens[None], context.block)[0]  # type: ignore[operator, no-any-return]

        jacobian = torch.autograd.functional.jacobian(output, image).flatten(0, 1).double().numpy()
        for token in clean.nonzero().flatten().tolist():
            j = jacobian[:, context.prefix + token]
            total += j.T @ j
            count += 1
    return total / count


def _architectures_and_readers() -> list[object]:
    """Every architecture with every reader; by default each of them once."""
    return [
        pytest.param(kind, reader, marks=() if k % len(READERS) == r else pytest.mark.slow)
        for k, kind in enumerate(ARCHITECTURES)
        for r, reader in enumerate(READERS)
    ]


@pytest.mark.parametrize(("kind", "reader"), _architectures_and_readers())
def test_curvature_against_the_exact_jacobian(kind: str, reader: str) -> None:
    context = make_context(kind, count=2)
    exact = exact_curvature(context, reader)
    sketch = curvature(context, reader, draws=300).numpy()
    # Its error falls with the root of the number of draws.
    assert np.linalg.norm(sketch - exact) < 0.25 * np.linalg.norm(exact)
    np.testing.assert_allclose(sketch, sketch.T, atol=1e-8)


def test_readers_of_the_last_block_are_the_final_norm() -> None:
    context = make_context(block=3, count=2)
    norm = context.suffix.model.norm(context.tokens)
    for read in READERS.values():
        torch.testing.assert_close(read(context.suffix, context.tokens, 3), norm)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "layer scale", "parallel", "gated"])
def test_bases_are_orthonormal(basis: str, block: int, kind: str) -> None:
    if basis == "weights-official" and kind in ("parallel", "gated"):
        pytest.skip("the authors' code knows plain MLPs only")
    context = make_context(kind, block, count=8)
    directions = BASES[basis](context, 4)
    assert directions.shape == (WIDTH, 4) and directions.dtype == torch.float32
    if basis != "weights-official":  # which fills up with vectors that are not
        torch.testing.assert_close(directions.T @ directions, torch.eye(4), atol=1e-4, rtol=0)
        with pytest.raises(UserError, match=r"refine\.rank 25 is larger than the feature width 24"):
            BASES[basis](context, 25)


def test_curvature_basis_sees_hardly_more_than_the_least() -> None:
    exact = exact_curvature(make_context(count=4), "final-norm")
    least = np.linalg.eigvalsh(exact)[:6].sum()
    seen = {}
    for name in ("curvature", "random"):
        v = BASES[name](make_context(), 6).double().numpy()
        seen[name] = np.trace(v.T @ exact @ v)
    assert seen["curvature"] - least < 0.5 * (seen["random"] - least)


def test_artifact_aware_finds_the_artifacts() -> None:
    directions = artifact_aware(make_context(), 2)
    planted = torch.zeros(WIDTH)
    planted[3], planted[4] = 60, 30
    assert float((planted / planted.norm() @ directions).norm()) > 0.9
    # Before it comes what costs nothing: all channels together, which norms take away.
    assert float(directions[:, 0].mean().abs()) * WIDTH**0.5 > 0.95


def test_generalised_eigenproblem_against_scipy() -> None:
    from scipy.linalg import eigh

    context = make_context()
    seen = curvature(context, "final-norm")
    floor = 1e-2 * float(seen.diagonal().mean()) * np.eye(WIDTH)
    _, vectors = eigh(context.artifact_energy().numpy(), seen.numpy() + floor)
    expected = np.linalg.qr(vectors[:, ::-1][:, :2])[0]
    found = artifact_aware(context, 2).numpy()
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_best_rank_is_that_of_the_artifacts() -> None:
    rank, curve = best_rank(make_context(), "artifact-aware")
    assert rank <= 3 and curve[rank - 1][0] > 0.8 and curve[rank - 1][1] < 0.3
    assert curve[-1] == pytest.approx((1, 1)) and len(curve) == WIDTH
    assert best_rank(make_context(artifacts=False), "artifact-aware")[0] == 1


def test_mlp_product_of_parallel_blocks_stacks_their_readers() -> None:
    context = make_context("parallel")
    assert mlp_product(context.suffix, 3).shape[1] == WIDTH


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**25))
def test_neighbour_mean_by_hand(rows: int, columns: int, bits: int) -> None:
    count = rows * columns
    clean = torch.tensor([[bool(bits >> i & 1) for i in range(count)]])
    x = torch.randn(1, count, 3)
    found = neighbour_mean(x, clean, (rows, columns))[0].numpy()
    kept = x[0][clean[0]].numpy()
    for i in range(count):
        near = [
            x[0, j].numpy()
            for j in range(count)
            if clean[0, j] and abs(j // columns - i // columns) <= 1 and abs(j % columns - i % columns) <= 1
        ]
        expected = np.mean(near, 0) if near else kept.mean(0) if len(kept) else np.zeros(3)
        np.testing.assert_allclose(found[i], expected, atol=1e-5)


@pytest.mark.parametrize("cleaner", ["clip", "neighbour", "projector"])
def test_closed_forms_touch_artifacts_alone(cleaner: str) -> None:
    context = make_context()
    layer = CLEANERS[cleaner](BlockSpec(WIDTH, 1, (4, 4)))
    layer.fit(context)
    cleaned = layer(context.tokens)
    torch.testing.assert_close(cleaned[:, 1:][context.clean], context.patches[context.clean])
    assert torch.equal(cleaned[:, :1], context.tokens[:, :1])
    assert float(cleaned[:, 1:].norm(dim=-1).max()) <= context.scale.threshold * (1 + 1e-5)


@pytest.mark.parametrize("basis", ["artifact", "random"])
def test_gated_adapters_touch_artifacts_alone(basis: str) -> None:
    """At the start, an artifact is what is expected there in the adapter's directions, and itself in all others.

    In random directions it stays so long that it is clipped.
    """
    context = make_context()
    layer, scale = GatedAdapter(BlockSpec(WIDTH, 1, (4, 4), rank=3)), context.scale
    v = BASES[basis](context, 3)
    layer.start(v, scale)
    cleaned, x = layer(context.tokens)[:, 1:], context.patches
    assert torch.equal(cleaned[context.clean], x[context.clean])
    own, found = (of[:, 5].detach().double().numpy() for of in (x, cleaned))
    expected = neighbour_mean(x, context.clean, (4, 4))[:, 5].double().numpy()
    inside = v.double().numpy() @ v.double().numpy().T
    wanted = expected @ inside + own @ (np.eye(WIDTH) - inside)
    length = np.linalg.norm(wanted, axis=1, keepdims=True)
    assert bool((length < scale.threshold).all()) == (basis == "artifact")
    np.testing.assert_allclose(found, wanted * np.minimum(1, scale.threshold / length), atol=1e-4)


def test_most_artifact_energy() -> None:
    context = make_context()
    vectors = np.linalg.eigh(context.artifact_energy().numpy()).eigenvectors
    assert abs(float(artifact(context, 2)[:, 0] @ torch.from_numpy(vectors[:, -1]).float())) > 0.999


def test_projector_is_the_minimum_it_claims() -> None:
    """Of |x' - t|² + μ(x' - x)ᵀC̃(x' - x); and of softness 0, the neighbours' mean."""
    context = make_context()
    projector = NullSpaceProjector(BlockSpec(WIDTH, 1, (4, 4), softness=0.7))
    projector.fit(context)
    seen = curvature(context, "final-norm")
    scaled = seen * WIDTH / seen.diagonal().sum()
    x, t = context.patches[0, 5].double(), neighbour_mean(context.patches, context.clean, (4, 4))[0, 5].double()
    moved = (x - (x - t) @ projector.move.double()).requires_grad_()
    cost = (moved - t).square().sum() + 0.7 * (moved - x) @ scaled @ (moved - x)
    (gradient,) = torch.autograd.grad(cost, moved)
    assert float(gradient.norm()) < 1e-3 * float((x - t).norm())
    free, near = NullSpaceProjector(BlockSpec(WIDTH, 1, (4, 4), softness=0.0)), Neighbour(BlockSpec(WIDTH, 1, (4, 4)))
    for layer in (free, near):
        layer.fit(context)
    torch.testing.assert_close(free(context.tokens), near(context.tokens), atol=1e-4, rtol=1e-4)


def test_without_a_grid_all_clean_patches_are_neighbours() -> None:
    context = replace(make_context(), grid=None)
    layer = Neighbour(BlockSpec(WIDTH, 1, None))
    layer.fit(context)
    expected = context.patches[:, [i for i in range(16) if i != 5]].mean(1)
    torch.testing.assert_close(layer(context.tokens)[:, 1 + 5], expected)
    assert artifact_aware(context, 2).shape == (WIDTH, 2)


@pytest.mark.parametrize("d", [1, 2, 4, 12, 20, 24, 64, 96, 192, 384, 768, 1024, 1280, 1408, 1536])
def test_hadamard(d: int) -> None:
    matrix = hadamard(d)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full((d, d), d**-0.5, dtype=torch.float64))


def test_no_hadamard_of_this_width() -> None:
    with pytest.raises(UserError, match="none is known here for 18 channels"):
        hadamard(18)


def test_phi_s_gives_every_channel_one_variance_by_a_rotation() -> None:
    x = torch.randn(4000, WIDTH) @ torch.randn(WIDTH, WIDTH) + 5
    prefix = torch.randn(300, 1, WIDTH) * 3 - 2
    moments = Moments(BlockSpec(WIDTH, 1, None), whole=True)
    moments.add(prefix, x)
    layer = PhiS(BlockSpec(WIDTH, 1, None))
    layer.fit(moments)
    y = layer(torch.cat([prefix[:1], x[None, :2000]], dim=1).reshape(1, -1, WIDTH))[0, 1:]
    whole = torch.cat([layer(torch.cat([prefix[:1], part[None]], dim=1))[0, 1:] for part in x.split(1000)])
    torch.testing.assert_close(whole.var(0), torch.ones(WIDTH), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(whole.mean(0), torch.zeros(WIDTH), atol=1e-3, rtol=0)
    # A rotation and one scale: distances keep their proportions.
    before, after = torch.pdist(x[:50]), torch.pdist(y[:50])
    torch.testing.assert_close(after / before, (after / before).mean().expand_as(after), atol=1e-4, rtol=1e-3)


def test_layernorm_before_standardising() -> None:
    x = torch.randn(2000, 1 + 3, WIDTH) * (1 + 9 * torch.rand(2000, 4, 1))
    spec = BlockSpec(WIDTH, 1, None)
    layer, plain = (NORMALISERS[name](spec) for name in ("layernorm-standardize", "standardize"))
    moments = Moments(spec)
    normed = torch.nn.functional.layer_norm(x, (WIDTH,))
    moments.add(normed[:, :1], normed[:, 1:].flatten(0, 1))
    for made in (layer, plain):
        made.fit(moments)
    torch.testing.assert_close(layer(x), plain(normed))
    torch.testing.assert_close(layer(5 * x), layer(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer(x)[:, 1:].flatten(0, 1).std(0), torch.ones(WIDTH), atol=1e-2, rtol=0)


@pytest.mark.parametrize("cleaner", ["clip", "neighbour", "projector"])
def test_a_clean_teacher_is_left_alone(cleaner: str) -> None:
    context = make_context(artifacts=False)
    refiner = Refiner({2: BlockSpec(WIDTH, 1, (4, 4))}, cleaner, "none")
    refiner.cleaner(2).fit(context)
    assert torch.equal(refiner({2: context.tokens})[2], context.tokens)


def test_registries_have_none() -> None:
    assert "none" in CLEANERS and "none" in NORMALISERS


def test_inspection_of_planted_artifacts() -> None:
    context = make_context()
    where = artifact_map(context)
    assert float(where[1, 1]) == 100 and float(where.sum()) == 100  # patch 5 of a 4 x 4 grid
    direction = artifact_direction(context)
    assert direction["channel"] == 3 and direction["cosine"] > 0.98 and direction["rank"] < 1.3
    assert direction["channel_share"] == pytest.approx(80, abs=3)  # 60² of 60² + 30²
    share = loss_share(context)
    assert share["tokens"] == pytest.approx(100 / 16) and share["loss"] > 90 and share["gradient"] > 40
    quantiles = norm_quantiles(torch.arange(101.0))
    assert quantiles["50 %"] == 50 and quantiles["99 %"] == 99 and quantiles["100 %"] == 100


def test_drift_and_splice() -> None:
    context = make_context()
    assert artifact_direction(make_context(artifacts=False)) == {}
    nothing = reader_drift(context, lambda x: x)
    for figures in nothing.values():
        assert figures["clean_l2"] == figures["artifact_l2"] == 0
        assert figures["clean_cosine"] == pytest.approx(1) and figures["artifact_cosine"] == pytest.approx(1)
    same = splice(context, lambda x: x)
    assert same["top1"] == 100 and same["kl"] == pytest.approx(0, abs=1e-6) and same["gram"] == 0
    doubled = reader_drift(context, lambda x: 2 * x)["next-norm"]
    assert doubled["clean_l2"] < 1 and doubled["clean_cosine"] > 0.999  # a norm sees no length
    noise = torch.randn(context.tokens.shape)
    spoiled = splice(context, lambda x: x + 3 * noise[: len(x)])
    assert spoiled["gram"] > 0.01 and spoiled["kl"] > 1e-3
    refined = reader_drift(context, lambda x: x + 3 * noise[: len(x)])
    assert refined["final-norm"]["clean_l2"] > 50
    # By hand: the change of the norm's output, over all clean patches.
    norm = context.suffix.block(3).norm1
    a, b = (norm(t)[:, 1:][context.clean] for t in (context.tokens, 1.5 * context.tokens + 1))
    expected = 100 * float((b - a).norm() / a.norm())
    assert reader_drift(context, lambda x: 1.5 * x + 1)["next-norm"]["clean_l2"] == pytest.approx(expected, rel=1e-3)


def test_blocks_that_norm_after_their_branches_have_no_norm_to_read() -> None:
    name, args = "vit_relpos_small_patch16_rpn_224", {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64}
    model = timm.create_model(name, **args)
    state = find_suffix(model, name, args, 1, 64)
    assert state is not None
    suffix = TeacherSuffix(name, args, 1, state)
    assert [*readers_of(suffix, 1)] == ["branch", "final-norm"] and [*readers_of(suffix, 2)] == [*READERS]
    tokens = torch.randn(4, 16, 24)
    context = FitContext(suffix, 1, tokens, make_context().scale, 0, (4, 4))
    assert [*reader_drift(context, lambda x: x)] == ["branch", "final-norm"]
