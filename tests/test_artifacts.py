"""What is taken for an artifact, and what is made of an image that has nothing else."""

import numpy as np
import pytest
import torch
from conftest import WIDTH, make_vit, seeded
from hypothesis import given
from hypothesis import strategies as st
from test_real import DATA
from test_real import WEIGHTS as REAL
from torch import Tensor

from pipeline.config import load_config
from pipeline.teachers.teacher import load_teacher
from singer.adapter_losses import robust_outlier
from singer.artifacts import BlockScale, clip_norms, patch_norms, robust_threshold
from singer.backbones import block_outputs
from singer.cleaners import CLEANERS, BlockSpec
from singer.fit_context import FitContext
from singer.suffix import TeacherSuffix, suffix_state

# Thresholds


def flagged(norms: Tensor, k: float = 6.0) -> float:
    """The share of the norms that are above their threshold."""
    return float((norms > robust_threshold(norms, k)).float().mean())


@pytest.mark.parametrize(
    "norms",
    {
        "one": torch.tensor([7.0]),
        "two": torch.tensor([1.0, 100.0]),
        "all equal": torch.full((64,), 12.0),
        "all zero": torch.zeros(64),
        "most equal": torch.cat([torch.full((60,), 12.0), torch.linspace(11, 13, 40)]),
        "half equal, half elsewhere": torch.cat([torch.full((50,), 10.0), torch.full((50,), 20.0)]),
        "tiny deviation": torch.cat([10 + 1e-5 * torch.randn(60), torch.linspace(9, 11, 40)]),
        "few levels": torch.randn(1000).mul(1.0).add(10).round(),
    }.items(),
    ids=lambda item: item[0],
)
def test_without_outliers_nothing_is_flagged(norms: tuple[str, Tensor]) -> None:
    assert flagged(norms[1]) == 0


def test_an_artifact_among_equal_norms_is_flagged() -> None:
    norms = torch.full((100,), 12.0)
    norms[7] = 570
    assert flagged(norms) == pytest.approx(0.01) and robust_threshold(norms, 6) < 24


@given(
    st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=80),
    st.floats(0.5, 20),
    st.sampled_from([2.0**-10, 8.0, 2.0**12]),
)
def test_thresholds_of_any_norms(values: list[float], k: float, factor: float) -> None:
    """At most a quarter is flagged, whatever the norms are; and in other units the same tokens are."""
    norms = torch.tensor(values)
    threshold = robust_threshold(norms, k)
    assert flagged(norms, k) <= 0.25 and threshold >= norms.median()
    assert robust_threshold(norms * factor, k) == pytest.approx(threshold * factor, rel=1e-6)


@given(
    st.sampled_from(["normal", "uniform", "laplace", "gamma"]),
    st.floats(0.0, 0.15),
    st.floats(0.0, 0.8),
    st.integers(0, 2**16),
)
def test_thresholds_of_distributions_without_outliers(shape: str, spread: float, equal: float, seed: int) -> None:
    """However small their deviation, and whatever share of the norms is one and the same."""
    rng = np.random.default_rng(seeded(seed))
    drawn = {
        "normal": lambda: rng.normal(0, 1, 4000),
        "uniform": lambda: rng.uniform(-(3**0.5), 3**0.5, 4000),
        "laplace": lambda: rng.laplace(0, 0.5**0.5, 4000),
        "gamma": lambda: (rng.gamma(9, 1, 4000) - 9) / 3,
    }[shape]()
    drawn[: int(equal * len(drawn))] = 0
    # Sigma is at least a twentieth of the median, so that the threshold is two deviations or more above it, and beyond
    # that these distributions have 3.5 % at most.
    assert flagged(torch.from_numpy(20 * (1 + spread * drawn)).float()) <= 0.05


@pytest.mark.skipif(not REAL.exists(), reason=f"no real teacher at {REAL}")
def test_the_floor_changes_no_threshold_of_the_real_teacher() -> None:
    """At every block: sigma is that of the deviation itself, and the quarter is far below."""
    sets = ["teacher.name=vit_tiny_patch16_224", f"teacher.weights={REAL}", "teacher.image_size=128"]
    teacher = load_teacher(load_config(sets=sets).teacher)
    files = sorted(DATA.glob("tinyimagenet50-val-*.tar"))
    if not files:
        pytest.skip("no real images")
    from pipeline.data import ImageFile, index_images
    from pipeline.data.views import apply_view, crop_view, normalise

    images = index_images(str(files[0]))
    with ImageFile(images) as opened:
        pixels = [apply_view(i, crop_view(1.0, i.size), 128) for i in (opened.read(n) for n in range(0, 480, 10))]
    with torch.inference_mode():
        x = normalise(torch.from_numpy(np.stack(pixels)), teacher.mean, teacher.std)
        for block, tokens in block_outputs(teacher.model, x, list(range(12))).items():
            norms = patch_norms(tokens, 1)
            median = norms.median()
            plain = float(median + 6 * 1.4826 * (norms - median).abs().median())
            assert robust_threshold(norms, 6) == pytest.approx(plain, rel=1e-6), block


def test_tokens_without_a_norm_stay_finite() -> None:
    assert torch.equal(clip_norms(torch.zeros(1, 3, 4), 0.0), torch.zeros(1, 3, 4))
    assert torch.isfinite(robust_outlier(torch.ones(1, 3), BlockScale(0.0, 0.0), 0.97))


# Images without a clean patch


def evidence_with(tokens: Tensor, grid: tuple[int, int] | None) -> FitContext:
    vit = make_vit()
    suffix = TeacherSuffix(vit.architecture, vit.model_args, 2, suffix_state(vit.model.state_dict(), 2))
    return FitContext(suffix, 2, tokens, BlockScale(5.0, 10.0), 1, grid)


@pytest.mark.parametrize("grid", [(4, 4), None], ids=["grid", "sampled"])
@pytest.mark.parametrize("cleaner", ["neighbour", "projector"])
def test_an_image_of_artifacts_alone_is_clipped(cleaner: str, grid: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(seeded(0))
    tokens = torch.randn(6, 17, WIDTH, generator=generator)
    tokens[2, 1:] *= 50
    tokens[3, 4] *= 50
    layers = {}
    for name in (cleaner, "clip"):
        layers[name] = CLEANERS[name](BlockSpec(WIDTH, 1, grid))
        layers[name].fit(evidence_with(tokens, grid))
    cleaned, clipped = (layers[name](tokens)[:, 1:] for name in (cleaner, "clip"))
    assert float(cleaned[2].norm(dim=-1).min()) > 1
    if cleaner == "neighbour":
        torch.testing.assert_close(cleaned[2], clipped[2])
        assert not torch.allclose(cleaned[3], clipped[3])  # that one has neighbours
    assert float(cleaned.norm(dim=-1).max()) <= 10 * (1 + 1e-5)


def test_an_image_of_artifacts_alone_is_no_energy_of_zeros() -> None:
    """What is expected there is the clipped token: its excess is what is above the threshold, not all of it."""
    tokens = torch.zeros(1, 5, WIDTH)
    tokens[0, 1:, 3] = 30.0
    energy = evidence_with(tokens, (2, 2)).artifact_energy()
    assert float(energy[3, 3]) == pytest.approx(20.0**2)
