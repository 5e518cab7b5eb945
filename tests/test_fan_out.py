"""Several students on one pass over the data: each as if it were alone, and what cannot share one."""

from pathlib import Path

import pytest
from conftest import seeded, world_config
from training_runs import WEIGHTS

from pipeline.stages.distill import distill, fan_out
from pipeline.stages.refine import refine
from pipeline.training.distilling.runs import StudentSpec
from singer.errors import UserError

FAN = {
    "plain": [],
    "other size and seed of nothing": ["student.dim=16", "student.patch_size=16"],
    "drops paths": ["student.drop_path=0.3", "distill.objective=vitkd", "distill.lr=3e-3"],
    "keeps an average": ["distill.ema=0.9", "distill.accumulate=2"],
}


def test_fan_out_is_as_training_alone(world: Path, tmp_path: Path) -> None:
    specs = [
        StudentSpec(
            world_config(world, *sets), tmp_path / "many" / name, None if name == "plain" else world / "adapters"
        )
        for name, sets in FAN.items()
    ]
    together = fan_out(specs, world / "cache")
    for spec, result in zip(specs, together, strict=True):
        alone = distill(spec.config, world / "cache", tmp_path / "alone" / spec.out.name, spec.refiner)
        assert alone.loss == result.loss
        for name in (WEIGHTS, "projectors.safetensors"):
            assert (alone.run / name).read_bytes() == (result.run / name).read_bytes(), spec.out.name
    assert fan_out(specs, world / "cache", mode="resume") == together


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            [f"distill.seed={seeded(1)}"],
            rf"a and .*b cannot train on one pass: distill\.seed is {seeded(0)} and {seeded(1)}",
        ),
        (["distill.epochs=3"], r"distill\.epochs is 2 and 3"),
    ],
)
def test_what_cannot_share_a_pass(world: Path, tmp_path: Path, sets: list[str], message: str) -> None:
    specs = [StudentSpec(world_config(world), tmp_path / "a"), StudentSpec(world_config(world, *sets), tmp_path / "b")]
    with pytest.raises(UserError, match=message):
        fan_out(specs, world / "cache")
    with pytest.raises(UserError, match="cannot have the same output folder"):
        fan_out([specs[0], specs[0]], world / "cache")
    assert not list(tmp_path.iterdir())


def test_checkpointing_repeats_what_was_drawn(world: Path, tmp_path: Path) -> None:
    """Two students on one pass that leave out patches and paths, and see each batch twice, learn what they do alone."""
    sets = ["student.drop_path=0.3", "distill.token_share=0.5", "distill.mask_share=0.25", "distill.epochs=1"]
    configs = [world_config(world, *sets, f"student.checkpointing={name}") for name in ("true", "false")]
    specs = [StudentSpec(config, tmp_path / name) for config, name in zip(configs, "ab", strict=True)]
    losses = [result.loss for result in fan_out(specs, world / "cache")]
    alone = distill(configs[1], world / "cache", tmp_path / "alone").loss
    assert losses == pytest.approx([alone, alone], rel=1e-5)


def test_students_of_different_blocks_share_no_pass(world: Path, tmp_path: Path) -> None:
    refine(world_config(world, "refine.cleaner=clip", "refine.blocks=[3]"), world / "cache", tmp_path / "a")
    specs = [
        StudentSpec(world_config(world), tmp_path / "raw"),
        StudentSpec(world_config(world), tmp_path / "clip", tmp_path / "a"),
    ]
    with pytest.raises(UserError, match="cannot train on one pass: they learn from different blocks"):
        fan_out(specs, world / "cache")
    assert not (tmp_path / "raw").exists()
    for blocks, message in (
        ("[]", "blocks: list should have at least 1 item"),
        ("[3, 3]", "one or more distinct numbers"),
    ):
        with pytest.raises(UserError, match=message):
            distill(world_config(world, f"distill.blocks={blocks}"), world / "cache", tmp_path / "raw")
