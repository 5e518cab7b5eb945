"""Stage 3: rates, targets, objectives, precision, what a run leaves."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import make_batch, seeded, targets_of, tree_bytes, world_config
from training_runs import CPU, WEIGHTS, epochs_fall

from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.config import Config
from pipeline.data import sampler
from pipeline.models.loading import load_saved
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.students.new import new_student
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.refining.stored_refiners import load_refiner
from pipeline.training.run_directory import RefinerKind, load_result
from pipeline.training.run_log import read_log
from pipeline.training.schedule import layer_decay, learning_rate, peak_rate
from pipeline.training.student_run import StudentRun
from singer.errors import UserError
from singer.objectives import OBJECTIVES
from singer.tokens import select_tokens


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
    projectors = safetensors.torch.load_file(tmp_path / "run" / "projectors.safetensors")  # by the teacher's blocks
    assert {k: tuple(v.shape) for k, v in projectors.items()} == {
        "2.weight": (24, 12),
        "2.bias": (24,),
        "3.weight": (24, 12),
        "3.bias": (24,),
    }
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["seed"] == seeded(0) and provenance["versions"]["torch"] == torch.__version__.split("+")[0]


def test_seeds(world: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(world_config(world, "distill.epochs=1", f"distill.seed={seed}"), world / "cache", tmp_path / name)
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


def test_checkpointing_and_accumulation_change_nothing_but_memory(world: Path, tmp_path: Path) -> None:
    losses = []
    for name, sets in (("a", []), ("b", ["student.checkpointing=true"]), ("c", ["distill.accumulate=3"])):
        losses.append(distill(world_config(world, *sets), world / "cache", tmp_path / name).loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


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

    config = world_config(world, "distill.trackers=[tensorboard]", "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run")
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
