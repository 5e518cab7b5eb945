"""Stages do the same in a caller's program, whatever it has set in torch, and leave its settings as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import shards, tree_bytes, world_config

from pipeline import Cache, distill, embed, evaluate, refine
from pipeline.config import Config

FILES = ["refiner/refiner.safetensors", "run/student/model.safetensors", "run/projectors.safetensors", "vectors.npy"]


@contextmanager
def other_settings() -> Iterator[None]:
    """Other defaults than torch's, no gradients, and half precision."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            yield
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled()
            assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def chain(config: Config, world: Path, out: Path) -> list[object]:
    """Refine, distill, embed and evaluate; return what the files and the figures are."""
    refiner = refine(config, world / "cache", out / "refiner").refiner
    run = distill(config, world / "cache", out / "run", refiner).run
    embed(config, run, shards(world, "test"), out / "vectors.npy")
    probed = evaluate(config, run, shards(world), shards(world, "test"))
    features = Cache(world / "cache").features([3, 0], torch.device("cpu"))
    return [
        *((out / file).read_bytes() for file in FILES),
        probed.linear,
        probed.knn,
        *map(torch.sum, features.values()),
    ]


def test_settings_of_a_caller_change_nothing(world: Path, tmp_path: Path) -> None:
    """Weights in bf16 show that no cast of them is kept from step to step, as in an autocast of the caller's."""
    sets = ["distill.epochs=1", "distill.share=0.3", "distill.precision=bf16", "refine.steps=3"]
    config = world_config(world, *sets, "evaluate.strengths=[1.0]")
    plain = chain(config, world, tmp_path / "plain")
    with other_settings():
        found = chain(config, world, tmp_path / "other")
    assert found == plain


def test_settings_of_accelerates_launcher_change_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would divide every loss by four, and compile the model besides distill.compile."""
    config = world_config(world, "distill.epochs=1", "distill.share=0.3")
    plain = distill(config, world / "cache", tmp_path / "plain").student
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it is compiled"))
    found = distill(config, world / "cache", tmp_path / "other").student
    assert tree_bytes(found) == tree_bytes(plain)
