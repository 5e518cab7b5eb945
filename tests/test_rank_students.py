"""Which untrained student is near a teacher: scores against NumPy, and the command on a cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_singer, seeded, world_config

from pipeline.cache import Cache
from pipeline.config import load_config
from pipeline.data import ImageFile, relocate
from pipeline.data.views import normalise
from pipeline.stages.rank_students import named_student, plain_students, rank_students, vit_parameters
from pipeline.students.new import new_student
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.tokens import global_tokens
from singer.zero_cost import gradient_norm, patch_distance, sample_distance


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def relations(samples: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return unit(samples @ samples.T), unit(tokens) @ unit(tokens).transpose(0, 2, 1)


def test_distances() -> None:
    """Also between widths that differ; a rotation of all features is no distance."""
    torch.manual_seed(seeded(0))
    a, b = torch.randn(5, 7, 6), torch.randn(5, 7, 9)
    ours, theirs = (relations(x[:, 0].double().numpy(), x.double().numpy()) for x in (a, b))
    assert float(sample_distance(a[:, 0], b[:, 0])) == pytest.approx(((ours[0] - theirs[0]) ** 2).mean(), rel=1e-4)
    assert float(patch_distance(a, b)) == pytest.approx(((ours[1] - theirs[1]) ** 2).mean(), rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert sample_distance(a[:, 0], a[:, 0] @ rotation) < 1e-10 > patch_distance(a, 3 * a @ rotation)


def test_gradient_norm() -> None:
    """By finite differences of the loss, of the parameters that it depends on."""
    torch.manual_seed(seeded(0))
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double(), torch.randn(4, 3).double()
    found, squares = gradient_norm(model(x).square().sum(), model), 0.0
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                ends = []
                for step in (1e-6, -2e-6):
                    p.view(-1)[i] += step
                    ends.append(float(model(x).square().sum()))
                p.view(-1)[i] += 1e-6
                squares += ((ends[0] - ends[1]) / 2e-6) ** 2
    assert found == pytest.approx(squares**0.5, rel=1e-4)


def test_command(world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ViTs within the budget; the scores are those of a student that is built alike."""
    args = ["rank-students", world / "cache", "--parameters", 250_000, "--batch", 8, "--starts", 1, "--json"]
    sets = ["student.patch_size=8", "student.mlp_ratio=2", f"distill.seed={seeded(0)}"]
    assert run_singer(monkeypatch, *args, *(w for s in sets for w in ("--set", s))) == 0
    result = json.loads(capfd.readouterr().out)
    found = {s["student"]: s for s in result["students"]}
    assert "nothing was trained" in result["caution"] and {*found} == {"vit 64 x 7, MLP x 2", "vit 96 x 3, MLP x 2"}
    assert all(abs(s["parameters"] - 250_000) <= 25_000 for s in found.values())
    scores = [s["diswot"] for s in result["students"]]
    assert scores == sorted(scores, reverse=True) and result["images"] == 8
    config = world_config(world, "student.dim=96", "student.depth=3", "student.heads=3", "student.mlp_ratio=2")
    torch.manual_seed(seeded(0))
    student, cache = new_student(config.student, 32), Cache(world / "cache")
    assert sum(p.numel() for p in student.model.parameters()) == vit_parameters(config.student, 3, 32)
    records = np.linspace(0, 99, 8).astype(int)
    pixels = cache.pixels(records, 32, ImageFile(relocate(cache.index.images, None)))
    images = normalise(pixels, student.mean, student.std)
    with torch.no_grad():
        own = block_outputs(student.model.eval(), images, [2])[2].double().numpy()
    theirs = cache.features(records, torch.device("cpu"))[3].double().numpy()
    a, b = (relations(x[:, 0], x[:, 1:]) for x in (own, theirs))
    expected = -sum(((x - y) ** 2).mean() for x, y in zip(a, b, strict=True))
    assert found["vit 96 x 3, MLP x 2"]["diswot"] == pytest.approx(expected, rel=1e-3)


def test_a_dozen_students_of_a_size() -> None:
    """Of the real chain; test_command compares the count with that of a model."""
    base = load_config("tinyimagenet-ti-to-w96").student
    found = plain_students(base, 1_000_000, 128)
    assert len(found) == 12 == len({(s.dim, s.depth, s.mlp_ratio) for s in found.values()})
    sizes = [vit_parameters(settings, settings.depth or 0, 128) for settings in found.values()]
    assert all(abs(size - 1_000_000) <= 100_000 for size in sizes)


def test_global_tokens() -> None:
    tokens = torch.randn(2, 7, 5)
    assert torch.equal(global_tokens(tokens, 3, True), tokens[:, 0])
    assert torch.equal(global_tokens(tokens, 3, False), tokens[:, 3:].mean(1))


def test_starts_are_averaged_and_other_grids_compared(world: Path) -> None:
    """Of students whose patches are twice as large: their tokens come to the teacher's grid."""
    sets = ["student.patch_size=16", "student.dim=64", "student.depth=2", "student.heads=2"]

    def score(seed: int, starts: int) -> float:
        config = world_config(world, *sets, f"distill.seed={seed}")
        (found,) = rank_students(config, world / "cache", names=["vit"], batch=8, starts=starts).students
        return found.diswot

    first, second = score(seeded(0), 1), score(seeded(1), 1)
    assert first != second and score(seeded(0), 2) == pytest.approx((first + second) / 2, rel=1e-6)


def test_named_students_and_none(world: Path) -> None:
    config = world_config(world)
    result = rank_students(config, world / "cache", names=["vit"], batch=4, starts=1)
    assert [s.student for s in result.students] == ["vit"]
    assert named_student(config.student, "convnext_atto").dim is None
    with pytest.raises(UserError, match="name students with --student"):
        rank_students(config, world / "cache")
    with pytest.raises(UserError, match="no plain ViT of 64 to 1,024 channels"):
        rank_students(config, world / "cache", 1000)
