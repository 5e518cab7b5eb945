"""The whole chain on two gloo processes, through accelerate's launcher, against one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tree_bytes, world_config

from pipeline.cache import Cache
from pipeline.checkpoint import Checkpoint, read_log
from pipeline.distill import distill

ROOT = Path(__file__).parent.parent


def launch(processes: int, *args: object) -> dict[str, object]:
    """`accelerate launch cli.py ARGS --json` on the CPU; the JSON object that it prints."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    accelerate += ["--num_processes", str(processes), "--main_process_port", "0"]
    command = [*accelerate, str(ROOT / "cli.py"), *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "only the first process speaks"
    value = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


@pytest.mark.timeout(600)
def test_chain_on_two_processes(world: Path, config_file: Path, tmp_path: Path) -> None:
    options = ["--config", config_file]
    shards = world / "train" / "*.tar"
    made = launch(2, "cache-teacher", "--shards", shards, "--out", tmp_path / "cache", *options)
    ignored = ("provenance.json", "config.yaml")
    assert tree_bytes(tmp_path / "cache", *ignored) == tree_bytes(world / "cache", *ignored)
    assert made["records"] == 100 and made["id"] == Cache(world / "cache").id

    # Two processes share the blocks out, and fit the same adapters.
    launch(2, "refine", "--cache", tmp_path / "cache", "--out", tmp_path / "adapters", *options)
    name = "refiner.safetensors"
    assert (tmp_path / "adapters" / name).read_bytes() == (world / "adapters" / name).read_bytes()

    train = ["distill", "--cache", tmp_path / "cache", "--adapters", world / "adapters", *options]
    # Logits read one of the two blocks, and with projectors of their own.
    train += ["--set", "distill.objective={mse: 1, logits: 0.5}"]
    runs = {n: tmp_path / f"run{n}" for n in (1, 2)}
    for processes, run in runs.items():
        # 100 records in batches of 15: the last batch of an epoch is smaller and does not divide by two.
        result = launch(processes, *train, "--batch-size", 15, "--out", run)
        assert result["steps"] == 14
    losses = [[line["loss"] for line in read_log(run / "log.jsonl")] for run in runs.values()]
    assert len(losses[0]) >= 4
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)
    for name in ("student/model.safetensors", "projectors.safetensors"):
        one, two = (safetensors.torch.load_file(run / name) for run in runs.values())
        for key, weight in one.items():
            # Adam divides rounding differences by tiny second moments; weights agree to a fraction of a step.
            torch.testing.assert_close(two[key], weight, atol=3e-5, rtol=1e-3)


@pytest.mark.timeout(300)
def test_resume_on_more_processes(
    world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by one process and interrupted in mid-epoch, ended by two: the same weights to rounding."""
    config = world_config(world, "distill.checkpoint_minutes=1e-9", "distill.batch_size=15")
    distill(config, world / "cache", tmp_path / "whole")
    saves, save = 0, Checkpoint.save

    def dying(self: Checkpoint, step: int, force: bool) -> None:
        nonlocal saves
        save(self, step, force)
        saves += 1
        if saves == 3:
            assert not force  # in the midst of an epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", tmp_path / "part")
    monkeypatch.undo()
    options = ["--config", config_file, "--set", "distill.checkpoint_minutes=1e-9", "--batch-size", 15, "--resume"]
    result = launch(2, "distill", "--cache", world / "cache", "--out", tmp_path / "part", *options)
    assert result["steps"] == 14
    one, two = (safetensors.torch.load_file(tmp_path / n / "student/model.safetensors") for n in ("whole", "part"))
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=3e-5, rtol=1e-3)
