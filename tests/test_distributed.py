"""The whole chain on two gloo processes against one process."""

import json
import os
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
from pipeline.models import new_student
from pipeline.readplan import EpochOrder, share
from pipeline.shards import ImageFile
from pipeline.views import normalise

ROOT = Path(__file__).parent.parent


def launch(processes: int, *args: object) -> dict[str, object]:
    """`torchrun cli.py ARGS --json` on the CPU; the JSON object that it prints.

    `accelerate launch --cpu` starts one process, whatever number it is given.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, str(ROOT / "cli.py"), *map(str, args), "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
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

    # Logits read one of the two blocks, and with projectors of their own. 100 records in batches of 15: the last batch
    # of an epoch is smaller and does not divide by two.
    sets = ["distill.objective={mse: 1, logits: 0.5}", "distill.batch_size=15"]
    runs = {n: tmp_path / f"run{n}" for n in (1, 2)}
    distill(world_config(world, *sets), world / "cache", runs[1], world / "adapters")
    train = ["distill", "--cache", tmp_path / "cache", "--adapters", world / "adapters", *options]
    assert launch(2, *train, *(part for value in sets for part in ("--set", value)), "--out", runs[2])["steps"] == 14
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


@pytest.mark.timeout(300)
def test_batch_norm_on_two_processes(world: Path, config_file: Path, tmp_path: Path) -> None:
    """On the CPU the running statistics are those of the first process's part: here, half of all records."""
    own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    sets = ["student.name=test_resnet", *own, "distill.epochs=1", "distill.batch_size=100"]
    options = [part for value in sets for part in ("--set", value)]
    launch(2, "distill", "--cache", world / "cache", "--out", tmp_path / "run", "--config", config_file, *options)
    torch.manual_seed(0)
    student = new_student(world_config(world, *sets).student, 32)
    cache = Cache(world / "cache")
    mine = share(EpochOrder(100, 0, 0), 0, 100, 0, 2).records
    with ImageFile(cache.index.images) as files:
        images = normalise(cache.pixels(mine, 32, files), student.mean, student.std, torch.device("cpu"))
    student.model.train()(images)
    saved = safetensors.torch.load_file(tmp_path / "run" / "student/model.safetensors")
    assert int(saved["bn1.num_batches_tracked"]) == 1
    for key in ("bn1.running_mean", "bn1.running_var"):
        torch.testing.assert_close(saved[key], student.model.state_dict()[key])


@pytest.mark.parametrize(("flag", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_models_in_shards_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    """As `accelerate launch` tells of it."""
    monkeypatch.setenv(flag, "true")
    with pytest.raises(ValueError, match=f"{name} is not supported; students are small: use DDP"):
        distill(world_config(world), world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()
