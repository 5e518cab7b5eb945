"""Several teachers in one run: whose losses add up, what must match, resuming, and what is told of each."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_batch, make_vit, seeded, world_config

import cli
from pipeline.cache import Cache
from pipeline.cache.stored import Decoded
from pipeline.config import Config
from pipeline.data.views import View, normalise
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import LOCAL
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill, fan_out
from pipeline.stages.export import export
from pipeline.stages.refine import refine
from pipeline.students.new import new_student
from pipeline.sweeps.run import sweep
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.refining.stored_refiners import load_refiner
from pipeline.training.run_directory import load_result
from pipeline.training.run_log import read_log
from singer.errors import UserError

CPU = torch.device("cpu")
WEIGHTS = "student/model.safetensors"


@pytest.fixture(scope="module")
def second(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher, wider, with a finer grid and other blocks: its teacher/, cache/ and adapters/."""
    root = tmp_path_factory.mktemp("second")
    teacher = make_vit(seed=5, embed_dim=32, depth=3, patch_size=4)
    save_backbone(teacher, teacher.model.state_dict(), root / "teacher")
    config = other_config(world, root)
    cache_teacher(config, str(world / "train" / "*.tar"), root / "cache")
    refine(config, root / "cache", root / "adapters")
    return root


def other_config(world: Path, second: Path, *sets: str) -> Config:
    own = [f"teacher.name={LOCAL}{second / 'teacher'}", "cache.blocks=[2]", "refine.cleaner=clip"]
    return world_config(world, *own, *sets)


def test_losses_add_up(world: Path, second: Path) -> None:
    """The loss is the weighted sum of mean squared errors computed by hand, and reaches everything that is trained."""
    student = new_student(world_config(world, "student.patch_size=4").student, 32)
    caches = [Cache(world / "cache"), Cache(second / "cache")]
    refiners = [load_refiner(r / "adapters", c) for r, c in zip((world, second), caches, strict=True)]
    heads = [
        TeacherBranch(student, m, Targets(c, r, student, CPU), Teaching({"mse": 1.0}, "linear", weight=w, name=n))
        for m, c, r, w, n in zip(({2: 1, 3: 2}, {2: 2}), caches, refiners, (0.25, 2.0), ("a", "b"), strict=True)
    ]
    model = Distiller(student, heads)
    records, pixels = [3, 8, 11], torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8)
    images = normalise(pixels, student.mean, student.std)
    features = [c.features(records, CPU) for c in caches]
    batch = make_batch([Decoded(x) for x in features], 3, pixels)
    losses, _ = model(batch)
    assert set(losses) == {"a.mse.2", "a.mse.3", "b.mse.2"}

    tokens = student.model.forward_intermediates(images, norm=False, return_prefix_tokens=True, output_fmt="NLC")[1]
    state = model.state_dict()

    def expected(name: str, index: int, block: int, output: int) -> torch.Tensor:
        patches, prefix = tokens[output]
        weight, bias = (state[f"{name}.projectors.{block}.{part}"] for part in ("weight", "bias"))
        target = refiners[index](features[index])[block]
        if index == 0:  # from the teacher's 4 x 4 patches to the student's 8 x 8
            maps = target[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            maps = torch.nn.functional.interpolate(maps, size=(8, 8), mode="bilinear")
            target = torch.cat([target[:, :1], maps.flatten(2).transpose(1, 2)], 1)
        return (torch.cat([prefix, patches], 1) @ weight.T + bias - target).square().mean()

    found = torch.stack(list(losses.values())).sum()
    by_hand = 0.25 * (expected("a", 0, 2, 1) + expected("a", 0, 3, 2)) / 2 + 2 * expected("b", 1, 2, 2)
    torch.testing.assert_close(found, by_hand)
    found.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_teacher_given_twice_with_halves_is_one(world: Path) -> None:
    """With the same projectors: the same loss, and the same gradient of the student."""
    cache = Cache(world / "cache")
    grads, sums = [], []
    for weights in ([1.0], [0.5, 0.5]):
        torch.manual_seed(seeded(0))
        student = new_student(world_config(world).student, 32)
        targets = Targets(cache, load_refiner(world / "adapters", cache), student, CPU)
        heads = []
        for n, weight in enumerate(weights):
            torch.manual_seed(seeded(1))
            heads.append(
                TeacherBranch(
                    student, {2: 1, 3: 2}, targets, Teaching({"mse": 1, "cosine": 2}, weight=weight, name=f"t-{n}")
                )
            )
        torch.manual_seed(seeded(2))
        shown = [Decoded(cache.features(range(6), CPU))] * len(weights)
        batch = make_batch(shown, 6)
        losses, _ = Distiller(student, heads)(batch)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        sums.append(total)
        grads.append(torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(sums[1], sums[0])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-7, rtol=1e-4)


def test_run_and_resume(world: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in mid-epoch it ends with the same bytes; it demands the same caches and adapters; the card names both."""
    config = world_config(world, "distill.checkpoint_minutes=1e-9", "distill.ema=0.9", "distill.teacher_weights=[1, 3]")
    caches, adapters = [world / "cache", second / "cache"], [world / "adapters", second / "adapters"]
    whole = distill(config, caches, tmp_path / "whole", adapters)
    first, other = whole.teachers
    assert (first.matching, other.matching) == ({2: 1, 3: 2}, {2: 2})
    assert other.refiner_kind is not None and (other.refiner_kind.cleaner, other.refiner) == ("clip", str(adapters[1]))
    assert load_result(whole.run) == whole
    names = set(read_log(whole.run / "log.jsonl")[0]["parts"])
    assert names == {"vit_tiny_patch16_224-1.mse.2", "vit_tiny_patch16_224-1.mse.3", "vit_tiny_patch16_224-2.mse.2"}
    stored = safetensors.torch.load_file(whole.run / "projectors.safetensors")
    assert stored["vit_tiny_patch16_224-2.projectors.2.weight"].shape == (32, 12)
    assert json.loads((whole.run / "inputs.json").read_text())["cache 2"] == Cache(second / "cache").id

    save = Checkpoint.save

    def dying(self: Checkpoint, step: int, write: bool) -> None:
        save(self, step, write)
        raise KeyboardInterrupt

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            distill(config, caches, part, adapters)
    for order, wrong in (([0, 0], r"cache \(number 2\)"), ([1, 0], "cache")):
        with pytest.raises(UserError, match=f"started with another {wrong};"):
            distill(config, [caches[n] for n in order], part, [adapters[n] for n in order], mode="resume")
    with pytest.raises(UserError, match="started with another refiner .number 2.; use that"):
        distill(config, caches, part, [adapters[0], None], mode="resume")
    distill(config, caches, part, adapters, mode="resume")
    for name in (WEIGHTS, "projectors.safetensors"):
        assert (part / name).read_bytes() == (whole.run / name).read_bytes()
    with pytest.raises(UserError, match="teacher_weights: 2 given for 1 --cache"):
        distill(config, caches[0], part, adapters[0], mode="resume")

    export(config, part, tmp_path / "export", "timm")
    card = (tmp_path / "export" / "README.md").read_text()
    for path, cache in zip(caches, (first, other), strict=True):
        assert Cache(path).id in card and cache.teacher.weights in card
    assert card.count("| refiner | cleaner ") == 2 and "| weights of the teachers | 1.0, 3.0 |" in card


def test_two_teachers_of_one_cache_from_the_command_line(
    world: Path, second: Path, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen by name in one cache, one refined and one raw, each with its own blocks."""
    config = other_config(world, second, "cache.blocks=[1,2]")
    both = tmp_path / "both"
    for tree in (world_config(world), config):
        cache_teacher(tree, str(world / "train" / "*.tar"), both, "append" if both.exists() else "new")
    other = Cache(both, f"{LOCAL}{second / 'teacher'}").manifest.teacher.weights
    refine(world_config(world, f"refine.teacher={other}", "refine.cleaner=clip"), both, tmp_path / "adapters")
    command = ["singer", "distill", "--config", config_file, "--out", tmp_path / "run", "--epochs", 1]
    command += ["--cache", both, "--cache", both, "--refiner", "none", "--refiner", tmp_path / "adapters"]
    sets = [f"distill.teacher=[null, {other}]", "distill.blocks=[[3], [1, 2]]"]
    command += [part for value in sets for part in ("--set", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0
    first, last = load_result(tmp_path / "run").teachers
    assert (first.matching, last.matching) == ({3: 2}, {1: 1, 2: 2}) and first.refiner is None
    assert last.teacher.weights == other
    assert "teacher block of vit_tiny_patch16_224-2 -> student block" in capsys.readouterr().err


def test_what_does_not_fit_together(world: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [world / "cache", second / "cache"]

    def refused(message: str, *sets: str, adapters: list[Path | None] | None = None) -> None:
        with pytest.raises(UserError, match=message):
            distill(world_config(world, *sets), caches, tmp_path / "run", adapters)
        assert not (tmp_path / "run").exists()

    refused("--refiner .none for raw targets.: 1 given for 2 --cache; give one for each", adapters=[None])
    refused("distill.teacher: 1 given for 2 --cache", "distill.teacher=vit_tiny_patch16_224")
    refused("distill.blocks: 1 given for 2 --cache", "distill.blocks=[2]")
    refused("distill.joint is for one teacher", "distill.joint=true")
    for name, sets, shards in (
        ("views", ["views.flip=1.0"], "train"),
        ("images", [], "test"),
        ("earlier", [], "train"),
    ):
        with monkeypatch.context() as patch:
            if name == "earlier":  # the same settings, by rules that were others then
                patch.setattr("pipeline.cache.view_reader.draw_view", lambda *_: View((0.0, 0.0, 0.5, 0.5)))
            cache_teacher(other_config(world, second, *sets), str(world / shards / "*.tar"), tmp_path / name)
        caches[1] = tmp_path / name
        refused(rf"cache \(vit_tiny_patch16_224, 100 records\) and .*{name} \(.*\) do not hold the same views of the")


def test_fan_out_and_sweep(world: Path, second: Path, tmp_path: Path) -> None:
    """Students with and without refiners on one pass, and in a sweep, are those trained alone."""
    caches, adapters = [world / "cache", second / "cache"], [world / "adapters", second / "adapters"]
    specs = [
        StudentSpec(world_config(world), tmp_path / "raw"),
        StudentSpec(world_config(world), tmp_path / "refined", adapters),
    ]
    fan_out(specs, caches)
    alone = distill(world_config(world), caches, tmp_path / "alone", adapters)
    weights = [(run / WEIGHTS).read_bytes() for run in (tmp_path / "raw", tmp_path / "refined", alone.run)]
    assert weights[0] != weights[1] == weights[2]

    base = world_config(world, "refine.cleaner=clip").model_dump(mode="json")
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps({"base": base, "runs": [{"name": "raw", "set": {"refiner": "none"}}, {"name": "clip"}]}))
    for mode in ("new", "resume"):
        result = sweep(file, caches, tmp_path / "sweep", mode)
        assert (result.done, result.failed) == (2, {})
    runs = tmp_path / "sweep" / "runs"
    assert (runs / "raw" / WEIGHTS).read_bytes() == weights[0]
    fitted = [tmp_path / "sweep" / "refiners" / "clip-standardize" / n for n in "12"]
    assert [t.refiner for t in load_result(runs / "clip").teachers] == [str(f) for f in fitted]
    with pytest.raises(UserError, match="started with another cache .number 2."):
        sweep(file, caches[:1], tmp_path / "sweep", "resume")
