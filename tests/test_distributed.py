"""The whole chain on two gloo processes against one process."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from conftest import draw_images, seeded, tree_bytes, world_config
from ranks import launch

from pipeline.cache import Cache, background_writer, create
from pipeline.cache.extract import Extractor
from pipeline.cache.manifest import Manifest
from pipeline.config import dump_config
from pipeline.data import ImageFile
from pipeline.data.sampler import EpochOrder, batch_indices
from pipeline.data.views import normalise
from pipeline.runtime.ranks import current
from pipeline.runtime.shared_counters import shared_counters
from pipeline.runtime.watched_rank import WatchedRank
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.storage import Store
from pipeline.students.new import new_student
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.fsdp import WholeModel, WholeOptimiser, check_fsdp
from pipeline.training.run_log import read_log
from pipeline.training.student_run import StudentRun
from singer.errors import UserError

ROOT = Path(__file__).parent.parent


def torchrun(processes: int, *args: object) -> dict[str, object]:
    """`torchrun cli.py ARGS --json` on the CPU; the JSON object that it prints.

    `accelerate launch --cpu` starts one process, whatever number it is given.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*start, str(ROOT / "cli.py"), *map(str, args), "--json"]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "only the first process speaks"
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


# Of matrices that FSDP has split, Muon rounds updates to bfloat16, which would hide differences between processes.
ADAMW = "distill.optimizer=adamw"


def test_chain_on_two_processes(world: Path, config_file: Path, tmp_path: Path) -> None:
    options = ["--config", config_file]
    made, _ = launch(2, "cache-teacher", "--images", world / "train" / "*.tar", "--out", tmp_path / "cache", *options)
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
    train = ["distill", "--cache", tmp_path / "cache", "--refiner", world / "adapters", *options]
    assert launch(2, *train, *(part for value in sets for part in ("--set", value)), "--out", runs[2])[0]["steps"] == 14
    losses = [[line["loss"] for line in read_log(run / "log.jsonl")] for run in runs.values()]
    assert len(losses[0]) >= 4
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)
    for name in ("student/model.safetensors", "projectors.safetensors"):
        one, two = (safetensors.torch.load_file(run / name) for run in runs.values())
        for key, weight in one.items():
            # Adam divides rounding differences by tiny second moments; weights agree to a fraction of a step.
            torch.testing.assert_close(two[key], weight, atol=3e-5, rtol=1e-3)


def _second_is_slow(notes: Path) -> None:
    """Write ten Zarr shards; the second process computes nothing until the first finds no more of them to take."""
    rank, free = os.environ["RANK"], notes / "free"
    features, write, wait = Extractor.features, background_writer.write_zarr_shard, WatchedRank.wait

    def slow_features(self: Extractor, *args: Any) -> dict[int, torch.Tensor]:
        while rank == "1" and not free.exists():
            time.sleep(0.01)
        return features(self, *args)

    def noted_write(store: Store, manifest: Manifest, shard: int, *args: Any) -> None:
        with (notes / rank).open("a") as file:
            print(shard, file=file)
        write(store, manifest, shard, *args)

    def noted_wait(self: WatchedRank) -> None:
        if rank == "0" and (notes / rank).exists():
            free.touch()
        wait(self)

    create.MAX_SHARD_RECORDS = 10
    Extractor.features = slow_features  # type: ignore[method-assign]
    background_writer.write_zarr_shard = noted_write
    WatchedRank.wait = noted_wait  # type: ignore[method-assign]


def test_a_slow_process_takes_fewer_zarr_shards(
    world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that it works on and the next, of ten; the bytes are those of one process, and so is the total."""
    monkeypatch.setattr(create, "MAX_SHARD_RECORDS", 10)
    shards, notes = str(world / "train" / "*.tar"), tmp_path / "notes"
    cache_teacher(world_config(world), shards, tmp_path / "one")
    notes.mkdir()
    options = ["--images", shards, "--out", tmp_path / "two", "--config", config_file]
    made, _ = launch(2, "cache-teacher", *options, before=partial(_second_is_slow, notes))
    ignored = ("provenance.json", "config.yaml")
    assert tree_bytes(tmp_path / "two", *ignored) == tree_bytes(tmp_path / "one", *ignored)
    taken = [[int(n) for n in file.read_text().split()] for rank in "01" if (file := notes / rank).exists()]
    assert sorted(n for numbers in taken for n in numbers) == list(range(10)) and len(taken[0]) >= 8
    assert made["records"] == 100


@pytest.mark.slow
def test_under_torchrun(world: Path, config_file: Path, tmp_path: Path) -> None:
    options = ["--images", world / "train" / "*.tar", "--out", tmp_path / "cache", "--config", config_file]
    assert torchrun(2, "cache-teacher", *options)["id"] == Cache(world / "cache").id


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true"}], ids=["ddp", "fsdp"])
@pytest.mark.slow
def test_losses_of_whole_batches_on_two_processes(
    world: Path, config_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    sets = ["distill.objective={mse: 1, queue: 0.1, angle: 1}", "distill.batch_size=20", "distill.epochs=2", ADAMW]
    # A start as whole blocks of the teacher, so that rates fall from block to block.
    sets += ["student.dim=24", "student.init=auto", "distill.projector=null", "distill.holdout=0.2"]
    distill(world_config(world, *sets), world / "cache", tmp_path / "run1")
    options = ["--config", config_file, *(part for value in sets for part in ("--set", value))]
    launch(2, "distill", "--cache", world / "cache", "--out", tmp_path / "run2", *options, environment=environment)
    one, two = (read_log(tmp_path / f"run{n}" / "log.jsonl") for n in (1, 2))
    for key in ("loss", "held_out_loss", "held_out_knn"):
        found = [[line[key] for line in lines if key in line] for lines in (two, one)]
        assert len(found[0]) >= 2
        torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-5, atol=0)


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_USE_FSDP": "true"}], ids=["ddp", "fsdp"])
@pytest.mark.slow
def test_half_of_the_patches_on_two_processes(
    world: Path, config_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """By default; each process draws its own."""
    sets = ["student.dim=24", "distill.projector=null", "distill.token_share=null", "distill.holdout=0.2", ADAMW]
    options = ["--config", config_file, *(part for value in sets for part in ("--set", value)), "--epochs", "4"]
    inputs = ["--cache", world / "cache", "--refiner", world / "adapters"]
    _, said = launch(2, "distill", *inputs, "--out", tmp_path / "run", *options, environment=environment)
    assert "the student sees 50 % of its patches" in said
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "held_out_knn" in line]
    assert len(lines) == 4 and lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]


def _note_states(notes: Path) -> None:
    """Let each process store, at the end of its training, all that it has trained, buffers too."""
    finish = StudentRun.finish

    def noting(self: StudentRun, *args: Any) -> None:
        assert isinstance(self.model.plain, torch.nn.parallel.DistributedDataParallel)
        assert not self.model.plain.broadcast_buffers
        state = {**self.learner.state_dict(), **dict(self.learner.named_buffers())}
        safetensors.torch.save_file({name: x.clone() for name, x in state.items()}, notes / os.environ["RANK"])
        finish(self, *args)

    StudentRun.finish = noting  # type: ignore[method-assign]


@pytest.mark.slow
def test_checkpointing_on_two_processes(world: Path, config_file: Path, tmp_path: Path) -> None:
    """With parts of a batch and a share of the patches it changes no loss. Processes hold the same bits without a

    broadcast, also those of queues and running means.
    """
    objective = "distill.objective={mse: 1, queue: 0.1, angle: 1, prototypes: 0.1}"
    sets = [
        objective,
        "distill.accumulate=2",
        "distill.token_share=0.5",
        "student.drop_path=0.2",
        "distill.clip_grad=1",
    ]
    losses = []
    for name in ("false", "true"):
        notes, out = tmp_path / f"notes-{name}", tmp_path / name
        notes.mkdir()
        options = [word for value in [*sets, f"student.checkpointing={name}"] for word in ("--set", value)]
        inputs = ["--cache", world / "cache", "--refiner", world / "adapters", "--config", config_file]
        launch(2, "distill", *inputs, "--out", out, *options, before=partial(_note_states, notes))
        first, second = (safetensors.torch.load_file(notes / rank) for rank in "01")
        assert any(name.endswith(".queue") for name in first) and first.keys() == second.keys()
        assert all(torch.equal(second[name], x) for name, x in first.items())
        losses.append(torch.tensor([line["loss"] for line in read_log(out / "log.jsonl")]))
    assert len(losses[0]) >= 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_from_photos_on_two_processes(world: Path, tmp_path: Path) -> None:
    """All processes rehearse, cache, refine and distil; the first packs, plans, reports and exports."""
    draw_images(tmp_path / "photos", 2, 12)
    file, out = tmp_path / "toy.yaml", tmp_path / "out"
    file.write_text(dump_config(world_config(world, "refine.cleaner=neighbour", "distill.epochs=1", "views.count=1")))
    made, _ = launch(2, "run", tmp_path / "photos", "--out", out, "--config", file)
    assert made["epochs"] == 1 and not (out / "rehearsal").exists()
    assert timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).embed_dim == 12


def _steady_adam() -> None:
    """Let Adam take small steps where gradients are tiny; otherwise it makes whole steps of their rounding.

    Adapters in joint training begin with gradients of zero, and some stay near it.
    """
    steady = partialmethod(torch.optim.AdamW.__init__, eps=1e-4)
    setattr(torch.optim.AdamW, "__init__", steady)  # noqa: B010 - mypy refuses an assignment to a method


@pytest.mark.parametrize(
    ("environment", "sets", "rounding"),
    [
        pytest.param({}, [], 1, id="ddp"),
        pytest.param({}, [ADAMW, "student.dim=24", "student.init=teacher", "student.lora=2"], 1, id="ddp and low rank"),
        pytest.param(
            {"ACCELERATE_USE_FSDP": "true"},
            [ADAMW, "distill.joint=true", "distill.ema=0.9", "distill.clip_grad=0.5", "distill.accumulate=2"],
            1,
            id="fsdp",
        ),
        pytest.param(
            {"ACCELERATE_USE_FSDP": "true"},
            [ADAMW, "distill.objective={mse: 1, minilm: 1}"],
            1,
            id="fsdp and own attention",
        ),
        pytest.param({"ACCELERATE_USE_FSDP": "true"}, [], 50, id="fsdp and muon"),
        pytest.param(
            {"ACCELERATE_USE_FSDP": "true"},
            [ADAMW, "student.dim=24", "student.init=teacher", "student.lora=2", "distill.ema=0.9"],
            1,
            id="fsdp and low rank",
        ),
    ],
)
@pytest.mark.slow
def test_resume_on_more_processes(
    world: Path,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    sets: list[str],
    rounding: float,
) -> None:
    """Begun by one process and interrupted in mid-epoch, ended by two, which hold all weights or, with FSDP in

    Accelerate's configuration, half of every weight each: the same losses and weights to rounding.
    """
    sets = ["distill.checkpoint_minutes=1e-9", "distill.batch_size=15", *sets]
    config = world_config(world, *sets)
    whole, part = tmp_path / "whole", tmp_path / "part"
    monkeypatch.setattr(torch.optim.AdamW, "__init__", torch.optim.AdamW.__init__)  # is put back
    _steady_adam()
    distill(config, world / "cache", whole)
    saves, save = 0, Checkpoint.save

    def dying(self: Checkpoint, step: int, write: bool) -> None:
        nonlocal saves
        save(self, step, write)
        saves += 1
        if saves == 3:
            assert step % 7  # in the midst of an epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", part)
    monkeypatch.undo()
    options = ["--config", config_file, "--resume", *(word for value in sets for word in ("--set", value))]
    place = ["--cache", world / "cache", "--out", part]
    result, said = launch(2, "distill", *place, *options, environment=environment, before=_steady_adam)
    assert result["steps"] == 14
    shards = re.search(r"each of 2 processes keeps about ([\d,]+) of ([\d,]+) weights", said)
    assert (shards is not None) == bool(environment)
    if shards is not None:
        kept, weights = (int(number.replace(",", "")) for number in shards.groups())
        assert 0.45 < kept / weights < 0.55
    one, two = ([line["loss"] for line in read_log(run / "log.jsonl")] for run in (whole, part))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=rounding * 1e-5, atol=0)
    files = ["student/model.safetensors", "projectors.safetensors"]
    for name in [*files, "adapters.safetensors"] if config.distill.joint else files:
        expected, found = (safetensors.torch.load_file(run / name) for run in (whole, part))
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=rounding * 1e-4, rtol=rounding * 1e-3)


@pytest.mark.slow
def test_batch_norm_on_two_processes(world: Path, config_file: Path, tmp_path: Path) -> None:
    """On the CPU the running statistics are those of the first process's part: here, half of all records."""
    own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    sets = ["student.name=test_resnet", *own, "distill.epochs=1", "distill.batch_size=100"]
    options = [part for value in sets for part in ("--set", value)]
    launch(2, "distill", "--cache", world / "cache", "--out", tmp_path / "run", "--config", config_file, *options)
    torch.manual_seed(seeded(0))
    student = new_student(world_config(world, *sets).student, 32)
    cache = Cache(world / "cache")
    mine = batch_indices(EpochOrder(100, seeded(0), 0), 0, 100, 0, 2).records
    with ImageFile(cache.index.images) as files:
        images = normalise(cache.pixels(mine, 32, files), student.mean, student.std)
    student.model.train()(images)
    saved = safetensors.torch.load_file(tmp_path / "run" / "student/model.safetensors")
    assert int(saved["bn1.num_batches_tracked"]) == 1
    for key in ("bn1.running_mean", "bn1.running_var"):
        torch.testing.assert_close(saved[key], student.model.state_dict()[key])


def test_states_that_do_not_fit_are_refused() -> None:
    """A missing weight, and the states of optimisers as they were kept before."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.AdamW(model.parameters())
    state = WholeModel(model).state_dict()
    WholeModel(model).load_state_dict(state)
    for name in ("0.weight", "1.running_mean"):
        with pytest.raises(UserError, match=f"lacks {name}"):
            WholeModel(model).load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(UserError, match=r"another version of singer; start the run anew \(--overwrite\)"):
        WholeOptimiser(model, optimiser).load_state_dict(optimiser.state_dict())


def test_deepspeed_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` tells of it."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not supported; use DDP"):
        distill(world_config(world), world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fp16_in_shards_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process has nothing in shards."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = world_config(world, "distill.precision=fp16")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="FSDP with fp16 .*; use precision bf16"):
        patch.setenv("WORLD_SIZE", "2")
        distill(config, world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_fsdp("fp16")


def test_one_process_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch has no processes."""
    monkeypatch.delattr(torch.distributed, "TCPStore")
    with shared_counters(current()) as add:
        assert [add("a", 2), add("b", 1), add("a", 3)] == [2, 1, 5]
