"""What tests of sweeps share: a sweep of four runs, and how to write and run one."""

from pathlib import Path
from typing import Any

import yaml
from conftest import world_config

from pipeline.sweeps.run import SweepResult, sweep

ROOT = Path(__file__).parent.parent
WEIGHTS = "student/model.safetensors"
# Two methods that share a refiner, and raw targets with two seeds.
RUNS: list[dict[str, Any]] = [
    {"name": "mse"},
    {"name": "cosine", "set": {"distill.objective": "cosine"}},
    {"name": "raw0", "set": {"refiner": "none"}},
    {"name": "raw1", "set": {"refiner": "none", "distill.seed": 1}},
]


def write(world: Path, file: Path, *sets: str, **tree: Any) -> Path:
    base = world_config(world, "refine.cleaner=clip", "evaluate.strengths=[0.1]", *sets).model_dump(mode="json")
    file.write_text(yaml.safe_dump({"base": base, **tree}))
    return file


def run(world: Path, file: Path, out: Path, *args: Any, probed: bool = False, **options: Any) -> SweepResult:
    if probed:
        options |= {"train": str(world / "train" / "*.tar"), "test": str(world / "test" / "*.tar")}
    return sweep(file, world / "cache", out, *args, **options)


def students(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in sorted((out / "runs").glob(f"*/{WEIGHTS}"))}


def run_whole(world: Path, file: Path, out: Path) -> Path:
    """Run and probe a sweep of RUNS, all of which succeed; its folder."""
    result = run(world, file, out, probed=True)
    assert (result.runs, result.done, result.failed) == (4, 4, {})
    return out
