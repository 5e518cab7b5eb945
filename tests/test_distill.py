"""Stage 3: plan, targets, training, resuming."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import make_batch, seeded, targets_of, tree_bytes, world_config

import pipeline.training.batch as stage
from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.checks import check_command
from pipeline.config import Config, load_config
from pipeline.data import relocate, sampler
from pipeline.data.sampler import BatchIndices
from pipeline.models.loading import load_saved
from pipeline.outputs.provenance import file_hash
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill, fan_out
from pipeline.stages.refine import refine
from pipeline.students.new import new_student
from pipeline.training.batch import Batch
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distiller import Distiller
from pipeline.training.joint_training import new_joint
from pipeline.training.run_directory import RefinerKind, load_result
from pipeline.training.run_log import read_log
from pipeline.training.runs import StudentSpec
from pipeline.training.schedule import layer_decay, learning_rate, peak_rate, token_share
from pipeline.training.stored_refiners import REFINER, load_refiner
from pipeline.training.student_run import StudentRun
from pipeline.training.subset import split_images
from pipeline.training.targets import Targets
from pipeline.training.teacher_branch import TeacherBranch, Teaching, explained_variance, squares
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.objectives import OBJECTIVES
from singer.patch_dropout import install
from singer.tokens import select_tokens

CPU = torch.device("cpu")
WEIGHTS = "student/model.safetensors"


def epochs_fall(run: Path, epochs: int) -> bool:
    """The mean loss of the last epoch is below that of the first: single batches differ from each other."""
    losses = [line["loss"] for line in read_log(run / "log.jsonl")]
    assert len(losses) == 7 * epochs
    return sum(losses[-7:]) < sum(losses[:7])


def test_learning_rate(config: Config) -> None:
    settings = config.distill.model_copy(update={"epochs": 10, "warmup_epochs": 1.0, "final_lr": 0.01})
    rates = [learning_rate(settings, step, 20, 1.0) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 21) and rates[20] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01) and max(rates) == rates[20]
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    middle = (20 + 199) / 2
    assert learning_rate(settings, round(middle), 20, 1.0) == pytest.approx(0.505, abs=0.01)
    widths = (48, 96, 384)
    for optimizer, rates in (("adamw", [4e-3, 4e-3, 1e-3]), ("muon", [4e-3, 4e-3, 2e-3])):
        auto = settings.model_copy(update={"lr": "auto", "optimizer": optimizer})
        assert [peak_rate(auto, width) for width in widths] == rates
    assert peak_rate(settings.model_copy(update={"lr": 0.5}), 384) == 0.5
    assert [layer_decay(settings, blocks, True) ** blocks for blocks in (2, 4, 24)] == pytest.approx(
        [0.7**2, 0.7**4, 0.7**4]
    )


def test_targets_are_refined_features_on_the_students_grid(world: Path) -> None:
    cache = Cache(world / "cache")
    refiner = load_refiner(world / "adapters", cache)
    encoded = cache.read([4, 7])
    refined = refiner(cache.decode(encoded, CPU))
    same = new_student(world_config(world).student, 32)
    for block, t in targets_of(Targets(cache, refiner, same, CPU), encoded).items():
        assert torch.equal(t, refined[block])
    raw = targets_of(Targets(cache, None, same, CPU), encoded)
    assert torch.equal(raw[3], cache.features([4, 7], CPU)[3])
    fine = new_student(world_config(world, "student.patch_size=4").student, 32)
    t = targets_of(Targets(cache, refiner, fine, CPU), encoded)[3]
    assert t.shape == (2, 1 + 64, 24)
    assert torch.equal(t[:, 0], refined[3][:, 0])


def test_select_tokens() -> None:
    tokens = torch.arange(6.0).view(1, 6, 1)  # CLS, two registers, three patches
    assert select_tokens(tokens, 3, True).flatten().tolist() == [0, 3, 4, 5]
    assert select_tokens(tokens, 3, False).flatten().tolist() == [3, 4, 5]


def test_every_trainable_parameter_gets_a_gradient(world: Path) -> None:
    student = new_student(world_config(world, "student.depth=6").student, 32)
    cache = Cache(world / "cache")
    model = Distiller(
        student, [TeacherBranch(student, {2: 3, 3: 4}, Targets(cache, None, student, CPU), Teaching({"mse": 1.0}))]
    )
    shown = [Decoded(cache.features([0, 1], CPU))]
    batch = make_batch(shown, 2)
    losses, _ = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == p.requires_grad or "bias" in name, name


def test_run(world: Path, tmp_path: Path) -> None:
    config = world_config(world, "distill.lr=3e-3", "distill.epochs=4")
    result = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    (link,) = result.teachers
    assert link.matching == {2: 1, 3: 2} and result.steps == 28
    assert link.teacher.weights == Cache(world / "cache").manifest.teacher.weights
    assert link.refiner == str(world / "adapters") and link.refiner_kind == RefinerKind("adapter", "standardize")
    assert sorted(f for f in tree_bytes(tmp_path / "run")) == [
        "config.yaml",
        "inputs.json",
        "log.jsonl",
        "projectors.safetensors",
        "provenance.json",
        "run.json",
        "student/config.json",
        "student/model.safetensors",
    ]
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert lines[-1]["step"] == 28 and epochs_fall(tmp_path / "run", 4)
    assert load_result(tmp_path / "run") == result
    student = timm.create_model(f"local-dir:{result.student}", pretrained=True)
    assert sum(p.numel() for p in student.parameters()) == result.parameters
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["seed"] == seeded(0) and provenance["versions"]["torch"] == torch.__version__.split("+")[0]


def test_seeds(world: Path, config: Config, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(world_config(world, f"distill.seed={seed}"), world / "cache", tmp_path / name)
    a, b, c = ((tmp_path / n / WEIGHTS).read_bytes() for n in "abc")
    assert a == b != c


def test_windows_in_one_piece(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However features are read, the same bytes; a window of neighbours, or some small batches, in one call."""
    config = world_config(world, "distill.read_block=8", "distill.shuffle_window=32", "distill.epochs=1")
    read, sizes = Cache.read, []
    monkeypatch.setattr(Cache, "read", lambda cache, records: sizes.append(len(records)) or read(cache, records))
    kinds = {
        "windows": (sampler.WINDOW_BYTES, 0, [4, 32, 32, 32]),
        "pieces": (0, sampler.PIECE_BYTES, [100]),
        "batches": (0, 0, [4, *[16] * 6]),
    }
    for name, (window, piece, wanted) in kinds.items():
        monkeypatch.setattr(sampler, "WINDOW_BYTES", window)
        monkeypatch.setattr(sampler, "PIECE_BYTES", piece)
        distill(config, world / "cache", tmp_path / name, world / "adapters")
        assert ("windows of 32 records are too large" in capsys.readouterr().err) == (name != "windows")
        assert sorted(sizes) == wanted
        sizes.clear()
    for name in (WEIGHTS, "projectors.safetensors"):
        assert len({(tmp_path / kind / name).read_bytes() for kind in kinds}) == 1


# Nothing but tokens that do not decay is trained, so that a group of the optimiser is empty.
REGISTERS = [
    "student.dim=24", "student.depth=4", "student.registers=3", "distill.projector=none", "distill.trained=[reg_token]",
]  # fmt: skip


def die_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the next run after it has read so many batches."""
    calls, pixels = 0, stage.BatchLoader.pixels

    def dying(self: stage.BatchLoader, part: BatchIndices) -> object:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise KeyboardInterrupt
        return pixels(self, part)

    monkeypatch.setattr(stage.BatchLoader, "pixels", dying)


def test_a_checkpoint_needs_no_weights_to_start_from(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a run end that starts from its own output, which the new one would replace."""
    begun, out = tmp_path / "begun", tmp_path / "run"
    distill(world_config(world, "distill.epochs=1"), world / "cache", begun)
    config = world_config(world, "distill.checkpoint_minutes=1e-9", f"student.init={begun}")
    with pytest.raises(UserError, match="overlaps the input"):
        distill(config, world / "cache", begun, mode="overwrite")
    with pytest.raises(UserError, match="overlaps the input"):
        check_command("distill", config, begun, "overwrite")
    distill(config, world / "cache", tmp_path / "whole")
    die_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", out)
    monkeypatch.undo()
    shutil.rmtree(begun)
    check_command("distill", config, out, "resume")
    distill(config, world / "cache", out, mode="resume")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="student.init: no file or folder"):
        check_command("distill", config, tmp_path / "other")


DEFAULTS = ["student.dim=24", "distill.projector=null", "distill.token_share=null"]
LORA = ["student.dim=24", "student.init=teacher", "student.lora=2", "distill.holdout=0.1", "distill.keep=best"]
WINDOWS = ["distill.read_block=4", "distill.shuffle_window=24"]


@pytest.mark.parametrize(
    ("stop_after", "sets"),
    [(3, []), (9, ["distill.mask_share=0.5"]), (9, REGISTERS), (9, DEFAULTS), (9, LORA), (9, WINDOWS)],
)
def test_resume_is_exact(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, sets: list[str]
) -> None:
    """A run that dies in some step, and goes on from its last checkpoint, ends with the same bytes."""
    config = world_config(world, "distill.checkpoint_minutes=1e-9", *sets)
    distill(config, world / "cache", tmp_path / "whole", world / "adapters")
    die_after(stop_after, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(config, world / "cache", tmp_path / "part", world / "adapters")
    monkeypatch.undo()
    assert (tmp_path / "part" / "checkpoint.pt").exists() and not (tmp_path / "part" / "run.json").exists()
    with (tmp_path / "part" / "log.jsonl").open("a") as log:
        log.write('{"step": 99, "loss": 0, "torn')
    distill(config, world / "cache", tmp_path / "part", world / "adapters", mode="resume")
    for name in (WEIGHTS, "projectors.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [[(line["step"], line["loss"]) for line in read_log(tmp_path / n / "log.jsonl")] for n in ("part", "whole")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "part" / "checkpoint.pt").exists()


def test_resume_refusals(world: Path, config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = distill(config, world / "cache", run)
    assert distill(config, world / "cache", run, mode="resume") == first
    with pytest.raises(UserError, match=r"started with distill\.lr auto, not 0\.5"):
        distill(world_config(world, "distill.lr=0.5"), world / "cache", run, mode="resume")
    with pytest.raises(UserError, match="started with another refiner;"):
        distill(config, world / "cache", run, world / "adapters", mode="resume")
    with pytest.raises(UserError, match="exists; continue it with --resume"):
        distill(config, world / "cache", run)


def test_resume_tells_refiners_of_one_tensor_apart(world: Path, tmp_path: Path) -> None:
    """A clip and a neighbour mean of one cache differ in their kind alone."""
    for cleaner in ("clip", "neighbour"):
        config = world_config(world, f"refine.cleaner={cleaner}", "refine.normaliser=none")
        refine(config, world / "cache", tmp_path / cleaner)
    assert file_hash(tmp_path / "clip" / REFINER) == file_hash(tmp_path / "neighbour" / REFINER)
    config = world_config(world, "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run", tmp_path / "clip")
    with pytest.raises(UserError, match="started with another refiner kind;"):
        distill(config, world / "cache", tmp_path / "run", tmp_path / "neighbour", mode="resume")


def test_moved_shards(world: Path, config: Config, tmp_path: Path) -> None:
    cache = Cache(world / "cache")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in cache.index.images.paths:
        (moved / path.name).write_bytes(path.read_bytes())
    images = relocate(cache.index.images, str(moved / "*.tar"))
    assert {p.parent for p in images.paths} == {moved}
    first = moved / cache.index.images.paths[0].name
    first.write_bytes(first.read_bytes() + b"\0" * 512)
    with pytest.raises(UserError, match="has changed since it was cached"):
        relocate(cache.index.images, str(moved / "*.tar"))
    first.unlink()
    twins = []
    for i, path in enumerate(sorted(moved.glob("*.tar"))):
        (moved / f"{i}").mkdir()
        twins.append(path.rename(moved / f"{i}" / "x.tar"))
    with pytest.raises(UserError, match="gives 3 sources with repeated names; the cache has 4"):
        relocate(cache.index.images, [str(p) for p in twins])
    (moved / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match=f"--images does not give {first.name}"):
        relocate(cache.index.images, str(moved / "*.tar"))


def test_other_resolution_patch_size_and_no_cls(world: Path, tmp_path: Path) -> None:
    sets = ["student.image_size=48", "student.patch_size=16", "distill.epochs=1"]
    result = distill(world_config(world, *sets), world / "cache", tmp_path / "a", world / "adapters")
    config = json.loads((result.student / "config.json").read_text())
    assert config["model_args"]["img_size"] == 48 and config["model_args"]["patch_size"] == 16
    assert np.isfinite(result.loss)


def test_mixed_precision_in_one_process_with_full_precision(world: Path, tmp_path: Path) -> None:
    """bfloat16 in both stages that compute with a model; close to float32, and not equal to it."""
    config = world_config(world, "cache.precision=bf16", "distill.precision=bf16")
    cache = cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "cache")
    exact, rough = (Cache(path).features([1, 2], CPU)[3] for path in (world / "cache", cache.cache))
    assert not torch.equal(exact, rough)
    assert float((exact - rough).norm() / exact.norm()) < 0.02
    half = distill(config, cache.cache, tmp_path / "half")
    full = distill(world_config(world), world / "cache", tmp_path / "full")
    assert half.loss == pytest.approx(full.loss, rel=0.05) and half.loss != full.loss


@pytest.mark.parametrize("codec", ["int8", "int4", "int1", "int4-plain", "int8-plain", "bfloat16"])
def test_mixed_precision_from_every_codec(world: Path, tmp_path: Path, codec: str) -> None:
    """Targets are decoded and refined in full precision, so the losses of both precisions differ by the student's."""
    cache = cache_teacher(
        world_config(world, f"cache.codec={codec}"), str(world / "train" / "*.tar"), tmp_path / "cache"
    )
    refine(world_config(world, "refine.steps=5"), cache.cache, tmp_path / "refiner")
    losses = {}
    for precision in ("no", "bf16"):
        config = world_config(world, f"distill.precision={precision}", "distill.epochs=1", "distill.holdout=0.2")
        losses[precision] = distill(config, cache.cache, tmp_path / precision, tmp_path / "refiner").loss
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05) and losses["bf16"] != losses["no"]


def test_diverging_run_stops(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is (nan|inf) at step"):
        distill(world_config(world, "distill.lr=1e30"), world / "cache", tmp_path / "a")


def test_the_last_update_may_not_diverge(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss sees it; a rate that is no number is refused before."""
    with pytest.raises(UserError, match="distill.lr"):
        world_config(world, "distill.lr=.inf")
    step, done = StudentRun.update, 0

    def last_is_lost(self: StudentRun, *args: Any, **more: Any) -> None:
        nonlocal done
        step(self, *args, **more)
        done += 1
        if done == 7:
            with torch.no_grad():
                next(self.student.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(StudentRun, "update", last_is_lost)
    with pytest.raises(UserError, match="the weights are not finite after the last step; lower distill.lr"):
        distill(world_config(world, "distill.epochs=1", "distill.batch_size=15"), world / "cache", tmp_path / "a")
    assert not (tmp_path / "a" / "student").exists()


def test_unknown_objective(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distill.objective: unknown 'msse'; known: mse"):
        distill(world_config(world, "distill.objective=msse"), world / "cache", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_checkpoint_is_no_pickle_of_code(world: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    checkpoint = Checkpoint(tmp_path / "c.pt", {"model": model, "optimiser": optimiser, "scaler": None}, minutes=60)
    assert not checkpoint.due and Checkpoint(tmp_path / "c.pt", {}, minutes=0).due
    checkpoint.save(7, write=False)
    assert not checkpoint.path.exists()
    checkpoint.save(7)
    other = torch.nn.Linear(2, 2)
    fresh = {"model": other, "optimiser": torch.optim.AdamW(other.parameters())}
    again = Checkpoint(tmp_path / "c.pt", fresh, minutes=60)
    assert again.restore() == 7 and torch.equal(other.weight, model.weight)
    (tmp_path / "c.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"c\.pt is damaged, or of another version; remove it"):
        again.restore()
    assert Checkpoint(tmp_path / "none.pt", {"model": other}, 1).restore() == 0


def test_projectors_belong_to_teacher_blocks(world: Path, config: Config, tmp_path: Path) -> None:
    distill(config, world / "cache", tmp_path / "run")
    projectors = safetensors.torch.load_file(tmp_path / "run" / "projectors.safetensors")
    assert {k: tuple(v.shape) for k, v in projectors.items()} == {
        "2.weight": (24, 12),
        "2.bias": (24,),
        "3.weight": (24, 12),
        "3.bias": (24,),
    }


@pytest.mark.parametrize("variant", ["official", "paper", "singer"])
def test_joint_training(world: Path, tmp_path: Path, variant: str) -> None:
    """Adapters and student together, as the paper has it; the adapters leave their start and are kept."""
    sets = ["distill.joint=true", f"refine.variant={variant}", "distill.epochs=3", "distill.lr=3e-3"]
    if variant == "singer":
        sets += ["refine.keep_weight=1", "refine.expect_weight=0.5"]
    distill(world_config(world, *sets), world / "cache", tmp_path / "run")
    assert epochs_fall(tmp_path / "run", 3)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    parts = {"mse.2", "mse.3", "outlier", "info"} | ({"keep", "expect"} if variant == "singer" else set())
    assert set(lines[0]["parts"]) == parts
    state = safetensors.torch.load_file(tmp_path / "run" / "adapters.safetensors")
    moved = [float((state[f"cleaners.{b}.down"] - state[f"cleaners.{b}.up"].T).norm()) for b in (2, 3)]
    assert min(moved) > 1e-3  # at the start they were equal, or up was zero


def test_joint_training_has_no_other_adapters(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.joint trains its own adapters; leave out --refiner"):
        distill(world_config(world, "distill.joint=true"), world / "cache", tmp_path / "run", world / "adapters")
    assert not (tmp_path / "run").exists()


# With one teacher, meal is logits, and its discriminator works against the student; tinymim is minilm of other kinds.
@pytest.mark.parametrize(
    "objective", [o for o in OBJECTIVES if o not in ("mse", "meal", "meal-discriminator", "tinymim")]
)
def test_objectives_train(world: Path, tmp_path: Path, objective: str) -> None:
    texts = tmp_path / "texts.npy"
    np.save(texts, np.random.default_rng(seeded(0)).normal(size=(4, 5)))
    sets = [f"distill.objective={objective}", "distill.epochs=3", "distill.lr=3e-3", f"distill.texts={texts}"]
    config = world_config(world, *sets)
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert epochs_fall(tmp_path / "run", 3)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert all(part.startswith(f"{objective}.") for part in lines[0]["parts"])


def test_mixtures_weigh_their_parts(world: Path, tmp_path: Path) -> None:
    losses = {}
    for name, objective in (("one", "mse"), ("three", "{mse: 3}"), ("both", "{mse: 1, labels: 0.5}")):
        config = world_config(world, f"distill.objective={objective}", "distill.epochs=1", "distill.lr=1e-9")
        distill(config, world / "cache", tmp_path / name, world / "adapters")
        losses[name] = read_log(tmp_path / name / "log.jsonl")[0]
    assert losses["three"]["loss"] == pytest.approx(3 * losses["one"]["loss"], rel=1e-4)
    assert set(losses["both"]["parts"]) == {"mse.2", "mse.3", "labels.ce"}
    assert losses["both"]["loss"] == pytest.approx(sum(losses["both"]["parts"].values()), rel=1e-5)
    assert losses["both"]["parts"]["labels.ce"] == pytest.approx(0.5 * np.log(4), rel=0.3)


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


def test_fan_out_resumes_from_different_steps(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two checkpoints, one student is an epoch ahead of the other."""
    specs = [StudentSpec(world_config(world, f"student.dim={d}"), tmp_path / f"{d}") for d in (12, 16)]
    saves, save = 0, Checkpoint.save

    def dying(self: Checkpoint, step: int, write: bool) -> None:
        nonlocal saves
        saves += 1
        if saves > 1:
            raise KeyboardInterrupt
        save(self, step, write)

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        fan_out(specs, world / "cache")
    monkeypatch.undo()
    assert [(spec.out / "checkpoint.pt").exists() for spec in specs] == [True, False]
    for spec, result in zip(specs, fan_out(specs, world / "cache", mode="resume"), strict=True):
        alone = distill(spec.config, world / "cache", tmp_path / "alone" / spec.out.name)
        assert (alone.run / WEIGHTS).read_bytes() == (result.run / WEIGHTS).read_bytes()


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


def test_checkpointing_and_accumulation_change_nothing_but_memory(world: Path, tmp_path: Path) -> None:
    losses = []
    for name, sets in (("a", []), ("b", ["student.checkpointing=true"]), ("c", ["distill.accumulate=3"])):
        losses.append(distill(world_config(world, *sets), world / "cache", tmp_path / name).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


def test_checkpointing_repeats_what_was_drawn(world: Path, tmp_path: Path) -> None:
    """Two students on one pass that leave out patches and paths, and see each batch twice, learn what they do alone."""
    sets = ["student.drop_path=0.3", "distill.token_share=0.5", "distill.mask_share=0.25", "distill.epochs=1"]
    configs = [world_config(world, *sets, f"student.checkpointing={name}") for name in ("true", "false")]
    specs = [StudentSpec(config, tmp_path / name) for config, name in zip(configs, "ab", strict=True)]
    losses = [result.loss for result in fan_out(specs, world / "cache")]
    alone = distill(configs[1], world / "cache", tmp_path / "alone").loss
    assert losses == pytest.approx([alone, alone], rel=1e-5)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_students_with_feature_maps(world: Path, tmp_path: Path, name: str) -> None:
    """Matched by stage, and compared on the teacher's grid."""
    own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    config = world_config(world, f"student.name={name}", *own, "distill.epochs=3")
    result = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert epochs_fall(tmp_path / "run", 3)
    again = load_saved(result.student)
    assert not again.has_cls and again.image_size == 32
    assert result.teachers[0].matching[3] == len(again.layout) - 1


def test_tensorboard(world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill(world_config(world, "distill.trackers=[tensorboard]"), world / "cache", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = read_log(tmp_path / "run" / "log.jsonl")
    seen = [(e.step, e.value) for e in events.Scalars("loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in lines]
    assert "loss/mse.3" in events.Tags()["scalars"]


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "unknown 'tensorbord'"), ("aim", "pip install aim")])
def test_trackers_that_are_not_there(world: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"distill.trackers: .*{message}"):
        distill(world_config(world, f"distill.trackers=[{name}]"), world / "cache", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["relation", "logits", "labels"])
def test_only_what_is_compared_is_trained(world: Path, tmp_path: Path, objective: str) -> None:
    """Of two matched blocks these read one: the other has neither projector nor gradient, and is not called matched."""
    config = world_config(world, f"distill.objective={objective}", "distill.epochs=1")
    result = distill(config, world / "cache", tmp_path / "run")
    assert list(result.teachers[0].matching) == ([2] if objective == "relation" else [3])
    stored = safetensors.torch.load_file(tmp_path / "run" / "projectors.safetensors")
    assert {n.split(".")[-2] for n in stored if "projectors" in n or n[0].isdigit()} == {
        str(*result.teachers[0].matching)
    }


def make_joint(world: Path, variant: str) -> tuple[Distiller, Batch]:
    config = world_config(world, f"refine.variant={variant}")
    cache, student = Cache(world / "cache"), new_student(config.student, 32)
    joint = new_joint(cache, config.refine, CPU)
    targets = Targets(cache, None, student, CPU)
    distiller = Distiller(student, [TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1.0}), joint)])
    shown = [Decoded(cache.features(range(8), CPU))]
    batch = make_batch(shown, 8)
    return distiller, batch


@pytest.mark.parametrize("variant", ["singer", "paper", "official"])
def test_parts_without_a_record_add_nothing(world: Path, variant: str) -> None:
    """The last batch of an epoch may leave a process nothing but filling."""
    distiller, batch = make_joint(world, variant)
    losses, _ = distiller(replace(batch, weights=torch.zeros(8)))
    assert set(losses) == set(distiller(batch)[0])
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in distiller.parameters())


def test_adapters_losses_of_parts_add_up(world: Path) -> None:
    distiller, batch = make_joint(world, "singer")
    whole, _ = distiller(batch)
    parts = [distiller(part)[0] for part in batch.split(2)]
    for name in ("outlier", "mse.2", "mse.3"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])


def test_joint_runs_are_continued_as_they_were_begun(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["distill.joint=true", "refine.variant=official"]
    # Until there is a checkpoint, settings may change, and those that are stored are those that were used.
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(StudentRun, "update", None)
        distill(world_config(world, sets[0]), world / "cache", tmp_path / "begun")
    distill(world_config(world, *sets), world / "cache", tmp_path / "begun", mode="resume")
    assert load_config(tmp_path / "begun" / "config.yaml").refine.variant == "official"
    distill(world_config(world, *sets), world / "cache", tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"started with refine\.variant official, not singer"):
        distill(world_config(world, sets[0]), world / "cache", tmp_path / "run", mode="resume")


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


def test_a_student_sees_a_share_of_its_patches(world: Path, tmp_path: Path) -> None:
    """The targets are those of the kept patches; the share is whole at the end; a resumed run draws the same."""
    student, cache = new_student(world_config(world).student, 32), Cache(world / "cache")
    targets = Targets(cache, None, student, CPU)
    settings = world_config(world, "distill.epochs=4", "distill.token_share=0.5").distill
    model = Distiller(student, [TeacherBranch(student, {2: 1, 3: 2}, targets, Teaching({"mse": 1.0}), whole=False)])
    model.drop_patches(0.5, settings)
    features = Decoded(cache.features([0, 1, 2], CPU))
    batch = make_batch([features], 3)
    whole, _ = model(batch)
    assert model.dropout is not None and model.dropout.kept is None
    model.dropout.share = 0.25
    part, errors = model(batch)
    kept = model.dropout.kept
    assert kept is not None and kept.shape == (3, 4) and part.keys() == whole.keys() and not errors
    found = targets.target_tokens(features.blocks, None, kept)
    for block, tokens in targets.target_tokens(features.blocks, None).items():
        for row in range(3):
            assert torch.equal(found[block][row, 1:], tokens[row, 1:][kept[row]])
    model.eval()
    losses, errors = model(batch)
    assert losses == whole and errors.keys() == {"2", "3", "tokens"}
    assert [token_share(0.5, settings, step, 10) for step in (0, 29, 30, 39)] == [0.5, 0.5, 1, 1]
    sets = ["distill.token_share=0.5", "distill.whole_share=0.5"]
    run = distill(world_config(world, *sets), world / "cache", tmp_path / "run", world / "adapters")
    timm.create_model(f"local-dir:{run.student}", pretrained=True)
    no_shape = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    for given, message in (
        (["distill.objective=vitkd"], "vitkd"),
        (["student.name=test_resnet", *no_shape], "cannot leave out patches; set it to 1"),
    ):
        with pytest.raises(UserError, match=message):
            distill(world_config(world, *sets, *given), world / "cache", tmp_path / "wrong", world / "adapters")


def test_patches_with_rotary_positions_keep_their_places() -> None:
    """Nothing is left out in eval mode; in training, the embedding of the kept patches goes with them."""
    model = timm.create_model("vit_small_patch16_dinov3", img_size=32, embed_dim=48, depth=2, num_heads=2, patch_size=8)
    dropout = install(model)
    images = torch.randn(2, 3, 32, 32)
    whole = block_outputs(model.eval(), images, [1])[1]
    dropout.share = 0.5
    assert torch.equal(block_outputs(model, images, [1])[1], whole)
    tokens = block_outputs(model.train(), images, [1])[1]
    assert dropout.kept is not None and dropout.kept.shape == (2, 8) and tokens.shape == (2, 5 + 8, 48)


def test_views_that_were_appended_stay_with_their_images(world: Path, tmp_path: Path) -> None:
    """No image is held out in one view and trained on in another; chosen images have all their views."""
    shards = str(world / "train" / "*.tar")
    for count, mode in ((1, "new"), (3, "append")):
        config = world_config(world, "cache.blocks=[3]", "views.flip=0.5", f"views.count={count}")
        cache_teacher(config, shards, tmp_path / "c", mode)
    cache = Cache(tmp_path / "c")
    images = cache.index.digest[cache.index.image]
    assert len(images) == 300 and np.unique(cache.index.image).size == 200
    for by in ("random", "prototypes"):
        settings = config.distill.model_copy(update={"holdout": 0.2, "share": 0.5, "share_by": by})
        train, held_out = split_images(cache, settings)
        assert train is not None and len(train) == 3 * 40 and len(held_out) == 3 * 20
        assert not {*images[train]} & {*images[held_out]} and np.unique(images[train]).size == 40
    once = Cache(world / "cache").index
    assert np.array_equal(once.first_image, once.image)


def test_a_share_of_the_images_is_trained_on(world: Path, tmp_path: Path) -> None:
    """The same at every step and beside held-out ones; a smaller share is a part of a larger one."""
    cache, settings = Cache(world / "cache"), world_config(world).distill
    assert split_images(cache, settings)[0] is None
    parts = {}
    for share in (0.3, 0.6, 1.0):
        train, held_out = split_images(cache, settings.model_copy(update={"share": share, "holdout": 0.1}))
        assert train is not None and len(train) == round(90 * share) and not {*train} & {*held_out}
        parts[share] = {*train.tolist()}
    assert parts[0.3] < parts[0.6] < parts[1.0]
    run = distill(world_config(world, "distill.share=0.3", "distill.epochs=3"), world / "cache", tmp_path / "run")
    assert run.steps == 3 * 2  # 30 records in batches of 16


def test_images_are_held_out(world: Path, tmp_path: Path) -> None:
    """All views of an image are on one side; figures of the others are in the log after every epoch."""
    config = world_config(world, "distill.holdout=0.1", "distill.epochs=3", "distill.lr=3e-3")
    cache = Cache(world / "cache")
    train, held_out = split_images(cache, config.distill)
    assert train is not None and sorted([*train, *held_out]) == list(range(100)) and len(held_out) == 10
    run = distill(config, world / "cache", tmp_path / "run", world / "adapters")
    assert run.steps == 3 * 6
    found = [line for line in read_log(tmp_path / "run/log.jsonl") if "held_out_loss" in line]
    assert [line["epoch"] for line in found] == [1, 2, 3]
    assert found[-1]["held_out_loss"] < found[0]["held_out_loss"]
    right = [line["held_out_knn"] / 10 for line in found]  # of ten images
    assert right == pytest.approx([round(count) for count in right], abs=1e-6)
    explained = [line["explained_variance"] for line in found]
    assert [*explained[0]] == ["2", "3"] and all(explained[-1][b] > explained[0][b] for b in explained[0])
    with pytest.raises(UserError, match="distill.holdout: all 100 images would be held out"):
        split_images(cache, config.distill.model_copy(update={"holdout": 0.999}))


def test_explained_variance_is_that_of_all_batches() -> None:
    """However the images are divided, and also of targets that are far from zero."""
    wanted = 1e3 + torch.randn(6, 5, 3)
    found = wanted + 0.5 * torch.randn(6, 5, 3)
    summed = sum(squares(wanted[rows], found[rows]) for rows in (slice(4), slice(4, 5), slice(5, 6)))
    expected = 1 - (wanted - found).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
    assert isinstance(summed, torch.Tensor) and explained_variance(summed) == pytest.approx(float(expected), rel=1e-4)
