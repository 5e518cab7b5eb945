"""Codecs: what they store, what comes back, and what their constants rest on."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pipeline.cache.calibration import Calibration, calibrate, few_records
from pipeline.cache.codecs import CODECS, Decoder
from pipeline.cache.packing import LEVELS, lloyd_max, pack, unpack
from pipeline.cache.stored import Encoded, Fixed, Ragged, Stored
from pipeline.runtime.compiling import any_length
from singer.artifacts import robust_threshold
from singer.errors import UserError

CPU = torch.device("cpu")
ALL = list(CODECS)
APART = ["int8", "int4", "int3", "int2", "int1"]
"""Codecs that keep outliers apart."""


def plain(mean: torch.Tensor, std: torch.Tensor) -> Calibration:
    """All tokens are patches, none is an outlier, and nothing is rotated."""
    none = mean.new_empty(0, len(mean))
    return Calibration(mean, std, none, none, float("inf"), torch.eye(1))


def gaussian(n: int, tokens: int, d: int, seed: int = 0) -> Tensor:
    """Tokens whose channels have means and spreads of their own."""
    generator = torch.Generator().manual_seed(seeded(seed))
    spread = 0.2 + 3 * torch.rand(d, generator=generator)
    return torch.randn(n, tokens, d, generator=generator) * spread + torch.randn(d, generator=generator)


def standard(x: Tensor, calibration: Calibration) -> Tensor:
    mean, std = calibration.by_token(x.shape[1])
    return (x - mean) / std


def there_and_back(name: str, x: Tensor, calibration: Calibration) -> Tensor:
    return CODECS[name].decode(CODECS[name].encode(x, calibration), calibration)


def take(stored: Stored, records: list[int]) -> Stored:
    def chosen(part: Tensor | Ragged) -> Tensor | Ragged:
        if isinstance(part, Tensor):
            return part[records]
        strings = part.data.split(part.lengths.tolist())
        return Ragged.cat([Ragged(strings[r], part.lengths[r : r + 1]) for r in records])

    return {name: chosen(part) for name, part in stored.items()}


def check_layout(name: str, stored: Stored, n: int, tokens: int, d: int) -> None:
    layout = CODECS[name].parts(tokens, d)
    assert list(stored) == list(layout)
    for part, form in layout.items():
        value = stored[part]
        if isinstance(value, Ragged):
            assert form is None and value.data.dtype == torch.uint8 and value.lengths.dtype == torch.int64
            assert value.lengths.shape == (n,) and value.data.shape == (int(value.lengths.sum()),)
        else:
            assert form == Fixed(tuple(value.shape[1:]), str(value.dtype).removeprefix("torch.")) and len(value) == n


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ALL), st.integers(0, 3), st.integers(1, 9), st.integers(1, 37), st.sampled_from([0, 1, 5]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_every_shape_comes_back(name: str, n: int, patches: int, d: int, prefix: int, seed: int) -> None:
    calibration = calibrate(gaussian(20, prefix + 9, d, seed), prefix)
    x = gaussian(20, prefix + patches, d, seed)[:n]
    stored = CODECS[name].encode(x, calibration)
    check_layout(name, stored, n, prefix + patches, d)
    decoded = CODECS[name].decode(stored, calibration)
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    # One scale a token: even signs lose no more than the token itself.
    error = standard(decoded, calibration) - standard(x, calibration)
    assert float(error.norm()) <= float(standard(x, calibration).norm()) * 0.8 + 1e-3


@pytest.mark.parametrize(
    ("name", "error", "cosine"),
    [
        ("float16", 5e-4, 0.999999),
        ("bfloat16", 4e-3, 0.99999),
        ("int8", 0.01, 0.9999),
        ("int4", 0.1, 0.995),
        ("int3", 0.19, 0.98),
        ("int2", 0.35, 0.93),
        ("int1", 0.61, 0.79),
        ("int8-plain", 0.01, 0.9999),
        ("int4-plain", 0.1, 0.995),
    ],
)
def test_distortion(name: str, error: float, cosine: float) -> None:
    """On standardised features, the hardest: a mean only raises the cosine."""
    x = gaussian(64, 18, 192)
    calibration = calibrate(x, 1)
    before, after = (standard(y, calibration) for y in (x, there_and_back(name, x, calibration)))
    assert float((after - before).norm() / before.norm()) <= error
    measured = float(torch.cosine_similarity(after, before, dim=-1).mean())
    assert measured >= cosine and measured > CODECS[name].min_cosine


def test_more_bytes_lose_less() -> None:
    x = gaussian(32, 17, 64)
    calibration = calibrate(x, 1)
    errors = [float((there_and_back(name, x, calibration) - x).norm()) for name in ("float16", *APART)]
    assert errors == sorted(errors)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 33), st.floats(1e-3, 1e4), st.integers(0, 10**6))
def test_int8_error_bound(n: int, tokens: int, d: int, scale: float, seed: int) -> None:
    """Every channel is within half a step of its token, a step being the token's largest standardised value / 127."""
    generator = torch.Generator().manual_seed(seeded(seed))
    mean, std = torch.randn(d, generator=generator) * scale, (torch.rand(d, generator=generator) + 0.1) * scale
    calibration = plain(mean, std)
    x = torch.randn(n, tokens, d, generator=generator) * scale
    x[0, 0] *= 30
    step = ((x - mean) / std).abs().amax(-1, keepdim=True) / 127
    for name in ("int8", "int8-plain"):
        error = ((there_and_back(name, x, calibration) - x) / std).abs()
        assert (error <= 0.51 * step + 2**-14 + 1e-4 * step * 127).all()


@pytest.mark.parametrize("name", ALL)
def test_tokens_at_the_mean_are_exact(name: str) -> None:
    calibration = plain(torch.full((6,), 3.0), torch.ones(6))
    x = torch.full((2, 3, 6), 3.0)
    assert torch.equal(there_and_back(name, x, calibration), x)


@pytest.mark.parametrize("name", ALL)
def test_a_silent_teacher(name: str) -> None:
    """Zeros everywhere have no spread to divide by."""
    zeros = torch.zeros(4, 6, 8)
    assert torch.equal(there_and_back(name, zeros, calibrate(zeros, 1)), zeros)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 40), st.floats(1e-20, 1e15), st.integers(0, 10**6)
)
def test_levels_are_the_nearest(bits: int, tokens: int, d: int, spread: float, seed: int) -> None:
    """To the float16 number: a level that is not the nearest is as far off as the nearest, but for the last bit."""
    y = torch.randn(2, tokens, d, generator=torch.Generator().manual_seed(seeded(seed))) * spread
    codes, scale = lloyd_max(y, LEVELS[bits])
    relative = y / y.square().mean(-1, keepdim=True).sqrt()
    magnitudes = torch.tensor(LEVELS[bits])
    levels = torch.cat([magnitudes, -magnitudes])
    distance = (relative.unsqueeze(-1) - levels).abs()
    chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 2**-10 * relative.abs() + 1e-6).all()
    level = levels[codes.long()]
    best = (level * y).sum(-1) / level.square().sum(-1)
    assert torch.allclose(scale, best, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 3, 4), (7, 2000, 200), (3, 1300, 1000)])
def test_a_few_records_at_a_time_are_the_same(shape: tuple[int, int, int]) -> None:
    x = gaussian(*shape)
    parts = few_records(x)
    assert torch.equal(torch.cat(parts), x)
    assert all(len(part) == 1 or part.numel() <= 2**20 for part in parts)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", APART)
def test_outliers_are_exact_to_float16(name: str, prefix: int) -> None:
    x = gaussian(8, prefix + 16, 30)
    calibration = calibrate(x, prefix)
    spoiled = x.clone()
    places = torch.tensor([[0, prefix], [0, prefix + 15], [3, prefix + 4], [7, prefix + 15]])
    spoiled[places[:, 0], places[:, 1]] *= 300
    stored = CODECS[name].encode(spoiled, calibration)
    outliers = stored["outliers"]
    assert isinstance(outliers, Ragged)
    assert (outliers.lengths // (2 + 2 * 30)).tolist() == [2, 0, 0, 1, 0, 0, 0, 1]
    assert outliers.data.numpy().view(np.uint16).reshape(4, 31)[:, 0].tolist() == places[:, 1].tolist()
    decoded = CODECS[name].decode(stored, calibration)
    far = torch.zeros(8, prefix + 16, dtype=torch.bool)
    far[places[:, 0], places[:, 1]] = True
    assert torch.equal(decoded[far], spoiled[far].half().float())
    codes = stored["codes"]
    assert isinstance(codes, Tensor) and not codes[far].any() and codes[~far].any(-1).all()
    # The other tokens know nothing of them.
    assert torch.equal(decoded[~far], there_and_back(name, x, calibration)[~far])


@pytest.mark.parametrize("name", APART)
def test_nothing_but_outliers(name: str) -> None:
    x = gaussian(3, 5, 12)
    calibration = calibrate(x, 0)
    assert torch.equal(there_and_back(name, 1000 * x, calibration), (1000 * x).half().float())


@pytest.mark.parametrize("name", sorted(CODECS))
def test_mixed_precision_around_it_changes_nothing(name: str) -> None:
    """A step of a student decodes within its autocast."""
    x = torch.randn(3, 17, 24, generator=torch.Generator().manual_seed(seeded(0)))
    x[1, 5] *= 50
    calibration = calibrate(x, 1)
    encoded = Encoded({0: CODECS[name].encode(x, calibration)})
    decode = Decoder(CODECS[name], {0: calibration})
    expected = decode(encoded).blocks[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(encoded).blocks[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_one_graph_decodes_any_number_of_outliers_above_one() -> None:
    """Compiled, as in a step on a GPU."""
    counter, codec = CompileCounter(), CODECS["int4"]
    x = torch.randn(8, 17, 24, generator=torch.Generator().manual_seed(seeded(0)))
    calibration = calibrate(x, 1)
    decode = Decoder(codec, {0: calibration})
    compiled = torch.compile(lambda encoded: decode(encoded).blocks[0], backend=counter)
    for outliers in (3, 8, 7, 4, 2):
        far = x.clone()
        far[:outliers, 5] *= 50
        encoded = Encoded({0: codec.encode(far, calibration)})
        for part in encoded.varying():
            any_length(part)
        torch.testing.assert_close(compiled(encoded), decode(encoded).blocks[0])
    assert counter.frame_count == 1


def test_outlier_positions_beyond_a_signed_word() -> None:
    x = torch.randn(1, 40_000, 2)
    calibration = calibrate(x, 0)
    x[0, -1] = 500
    assert there_and_back("int4", x, calibration)[0, -1].tolist() == [500, 500]


@pytest.mark.parametrize("name", APART)
def test_a_prefix_token_is_coded_by_its_own_statistics(name: str) -> None:
    """Registers may be far longer than patches; that makes them no outliers, nor worse."""
    x = gaussian(40, 14, 32)
    x[:, :5] = 400 + 50 * x[:, :5]
    calibration = calibrate(x, 5)
    stored = CODECS[name].encode(x, calibration)
    outliers = stored["outliers"]
    assert isinstance(outliers, Ragged) and not len(outliers.data)
    before, after = (standard(y, calibration) for y in (x, CODECS[name].decode(stored, calibration)))
    own, patches = ((after - before)[:, part].norm() / before[:, part].norm() for part in (slice(5), slice(5, None)))
    assert float(own) <= 1.1 * float(patches)


def test_a_prefix_token_beyond_any_scale_is_kept() -> None:
    x = torch.randn(20, 4, 8)
    x[:, 0] = 1.0
    calibration = calibrate(x, 1)
    x[2, 0] = 9000.0
    decoded = there_and_back("int4", x, calibration)
    assert torch.equal(decoded[2, 0], x[2, 0])
    torch.testing.assert_close(decoded[3, 0], x[3, 0])


@pytest.mark.parametrize("name", ["float16", *APART])
@pytest.mark.parametrize("huge", [7e4, 1e30])
def test_overflow_names_the_way_out(name: str, huge: float) -> None:
    x = torch.randn(4, 5, 8)
    calibration = calibrate(x, 1)
    x[1, 2] = huge
    with pytest.raises(UserError, match=r"beyond float16 \(65504\); use cache.codec bfloat16"):
        CODECS[name].encode(x, calibration)
    torch.testing.assert_close(there_and_back("bfloat16", x, calibration), x, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["int8-plain", "int4-plain"])
def test_a_scale_that_overflows_is_refused(name: str) -> None:
    calibration = calibrate(torch.randn(4, 5, 8), 1)
    with pytest.raises(UserError, match="beyond float16"):
        CODECS[name].encode(torch.full((1, 5, 8), 1e9), calibration)


@pytest.mark.parametrize("name", ALL)
def test_records_and_tokens_are_independent(name: str) -> None:
    x = gaussian(6, 12, 25)
    calibration = calibrate(x, 2)
    x[1, 4] *= 200
    x[4, 9] *= 200
    stored = CODECS[name].encode(x, calibration)
    whole = CODECS[name].decode(stored, calibration)
    order = [4, 0, 1, 4]
    torch.testing.assert_close(
        CODECS[name].decode(take(stored, order), calibration), whole[order], rtol=1e-6, atol=1e-5
    )
    tokens = [0, 1, 4, 3, 9]
    sampled = there_and_back(name, x[:, tokens], calibration)
    torch.testing.assert_close(sampled, whole[:, tokens], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_decode_stays_on_the_device_of_the_parts(name: str) -> None:
    """Tensors without memory refuse to meet any that have it."""
    x = gaussian(3, 9, 10)
    calibration = calibrate(x, 1)
    x[1, 4] *= 200
    stored = {k: part.to(torch.device("meta")) for k, part in CODECS[name].encode(x, calibration).items()}
    bare = {k: t.to("meta") for k, t in calibration.tensors().items()} | {"threshold": torch.tensor(1.0)}
    decoded = CODECS[name].decode(stored, Calibration.from_tensors(bare))
    assert decoded.is_meta and decoded.shape == x.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_gives_the_same(name: str) -> None:
    x = gaussian(6, 12, 25)
    calibration = calibrate(x, 2)
    x[1, 4] *= 200
    there = calibration.to("cuda")
    stored = CODECS[name].encode(x.cuda(), there)
    expected = there_and_back(name, x, calibration)
    assert float((CODECS[name].decode(stored, there).cpu() - expected).norm() / expected.norm()) < 1e-3
    moved = {k: part.to(CPU) for k, part in stored.items()}
    torch.testing.assert_close(CODECS[name].decode(moved, calibration), CODECS[name].decode(stored, there).cpu())


@given(st.sampled_from(sorted(LEVELS)), st.integers(0, 5), st.integers(1, 40), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_packing_is_exact(bits: int, n: int, d: int, seed: int) -> None:
    codes = torch.randint(2**bits, (n, 2, d), dtype=torch.uint8, generator=torch.Generator().manual_seed(seeded(seed)))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] <= d * bits / 8 + 2
    magnitude, sign = codes & (2 ** (bits - 1) - 1), codes >> (bits - 1)
    expected = torch.tensor(LEVELS[bits])[magnitude.long()] * (1 - 2 * sign.float())
    assert torch.equal(unpack(packed, bits, d), expected)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_lloyd_max(bits: int) -> None:
    """Each level is the mean of the normal variable over its cell, whose edges lie midway between levels."""
    levels = LEVELS[bits]
    assert len(levels) == 2 ** (bits - 1) and list(levels) == sorted(levels)
    edges = [0, *((a + b) / 2 for a, b in pairwise(levels)), np.inf]
    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        mass, _ = integrate.quad(stats.norm.pdf, low, high)
        moment, _ = integrate.quad(lambda v: v * stats.norm.pdf(v), low, high)
        assert level == pytest.approx(moment / mass, abs=2e-9)


def test_calibration_is_of_clean_tokens() -> None:
    x = gaussian(50, 20, 12).double()
    x[:, 0] = x[:, 0] * 2 + 7
    dirty = x.clone()
    dirty[::5, 3] = 500
    norms = dirty[:, 1:].norm(dim=-1)
    clean = dirty[:, 1:][norms <= robust_threshold(norms, 6)]
    calibration = calibrate(dirty.float(), 1)
    assert calibration.prefix == 1 and calibration.threshold == pytest.approx(robust_threshold(norms, 6), rel=1e-5)
    assert len(clean) <= 50 * 19 - 10
    for found, expected in (
        (calibration.mean, clean.mean(0)),
        (calibration.std, clean.std(0, correction=0)),
        (calibration.prefix_mean[0], x[:, 0].mean(0)),
        (calibration.prefix_std[0], x[:, 0].std(0, correction=0)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("d", "side"), [(1, 1), (24, 24), (67, 1), (192, 64), (1000, 50), (1024, 64)])
def test_rotation(d: int, side: int) -> None:
    rotation = calibrate(torch.randn(4, 3, d), 1).rotation
    assert rotation.shape == (side, side)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(side), atol=1e-5, rtol=0)
    assert torch.equal(rotation, calibrate(torch.randn(2, 5, d), 0).rotation)


def test_rotation_spreads_a_lone_channel() -> None:
    """One large value in a token drowns the others' levels, unless it is spread over its block."""
    x = torch.randn(200, 4, 64)
    calibration = calibrate(x, 0)
    x[..., 5] *= 12
    bare = calibration.tensors() | {"rotation": torch.eye(64), "threshold": torch.tensor(float("inf"))}
    rotated = bare | {"rotation": calibration.rotation}
    errors = [float((there_and_back("int4", x, Calibration.from_tensors(c)) - x).norm()) for c in (rotated, bare)]
    assert errors[0] < 0.8 * errors[1]


def test_calibration_survives_its_tensors() -> None:
    calibration = calibrate(gaussian(9, 7, 10), 2)
    again = Calibration.from_tensors({k: t.clone() for k, t in calibration.tensors().items()})
    assert again.threshold == calibration.threshold
    for name, tensor in calibration.tensors().items():
        assert torch.equal(again.tensors()[name], tensor) and tensor.is_contiguous()


@pytest.mark.parametrize("missing", ["mean", "std", "rotation", "threshold", "prefix_std"])
def test_a_calibration_in_part_is_refused(missing: str) -> None:
    tensors = calibrate(gaussian(9, 7, 10), 2).tensors()
    del tensors[missing]
    with pytest.raises(KeyError, match=missing):
        Calibration.from_tensors(tensors)


def test_ragged_cat() -> None:
    a = Ragged(torch.arange(3, dtype=torch.uint8), torch.tensor([1, 2]))
    b = Ragged(torch.arange(4, dtype=torch.uint8), torch.tensor([0, 4]))
    both = Ragged.cat([a, b])
    assert both.data.tolist() == [0, 1, 2, 0, 1, 2, 3] and both.lengths.tolist() == [1, 2, 0, 4]


def test_no_outliers_from_a_file() -> None:
    """NumPy's empty arrays have other strides than PyTorch's."""
    x = torch.randn(2, 5, 8)
    codec, calibration = CODECS["int4"], calibrate(x, 1)
    stored = codec.encode(x.clamp(-1, 1), calibration)
    none = Ragged(torch.from_numpy(np.empty(0, np.uint8)), torch.zeros(2, dtype=torch.int64))
    assert codec.decode({"codes": stored["codes"], "outliers": none}, calibration).shape == x.shape
