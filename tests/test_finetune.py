"""Fine-tuning with labels: it learns, what is drawn depends on seed, key, epoch and step alone, and a run resumes."""

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import config_with, make_vit, run_singer, seeded, shards, tree_bytes, world_config
from PIL import Image
from ranks import launch
from sklearn.linear_model import LogisticRegression
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform
from timm.data.mixup import mixup_target

from pipeline.config import Config, FinetuneConfig
from pipeline.data import ImageFile, index_images
from pipeline.data.sampler import BatchIndices
from pipeline.data.views import apply_view, draw_view, generator, normalise
from pipeline.evaluation.linear_head import probe_weights
from pipeline.evaluation.own_head import OwnHead
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_saved
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.finetune import finetune, teacher_of_labels
from pipeline.stages.prepare import prepare
from pipeline.students.with_head import set_head, student_with_head
from pipeline.training.augmentation import OPERATIONS, arguments, erase
from pipeline.training.batch import Batch
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.classifier import Classifier
from pipeline.training.head_teacher import HeadTeacher
from pipeline.training.labelled import LabelledLoader, views_of
from pipeline.training.mixing import Mixing
from pipeline.training.run_directory import load_result
from pipeline.training.run_log import read_log
from singer.errors import UserError

WEIGHTS = "student/model.safetensors"
SETS = [
    "finetune.epochs=4",
    "finetune.batch_size=20",
    "finetune.workers=1",
    "finetune.trackers=[]",
    "evaluate.strengths=[1.0]",
    f"finetune.seed={seeded(0)}",
]


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled student; tests only read it."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    distill(world_config(world, "distill.epochs=1", "distill.optimizer=adamw"), world / "cache", out)
    return out


def test_head_and_student_learn(world: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a head of zeros the loss falls, and images are told apart far above chance; no weight stays as it was.

    The folders name the classes, and the test is that of `evaluate --task head`.
    """
    sets = ["finetune.head=zeros", "finetune.epochs=6", "finetune.lr=1e-2", "finetune.mixup=0", "finetune.cutmix=0"]
    config = world_config(world, *SETS, *sets, "finetune.scale=[0.7, 1]", "finetune.holdout=0.2")
    out, (train, test) = tmp_path / "out", (world / "images" / split for split in ("train", "test"))
    made = finetune(config, run, train, out, test)
    assert capsys.readouterr().err.count("note: 24 steps of training may teach little") == 1
    lines = [line for line in read_log(out / "log.jsonl") if "held_out_top1" in line]
    assert len(lines) == 6 and lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    assert lines[-1]["held_out_top1"] > 60 and lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert (made.finetuned.classes, made.finetuned.images, made.finetuned.steps) == (4, 80, 24)
    before, after = (safetensors.torch.load_file(place / WEIGHTS) for place in (run, out))
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    assert not [name for name, x in before.items() if torch.equal(after[name], x)]
    assert made.test is not None and made.test.top1 > 60 and made.test.learned_from_test == "no"
    again = evaluate(config, out, None, test, "head")
    assert isinstance(again, OwnHead) and again.top1 == made.test.top1
    assert len(list(out.glob("evaluate-*.json"))) == 1
    assert evaluate(config, out, None, train, "head").learned_from_test == "yes"


def test_a_head_starts_as_the_linear_probe(world: Path, run: Path) -> None:
    """The student says what scikit-learn does of its pooled output; a class without images is never said."""
    config, images = world_config(world, *SETS), index_images(shards(world))
    before, student = load_saved(run / "student"), student_with_head(run / "student", config.finetune, 5)
    with ImageFile(images) as files:
        load = LabelledLoader(files, np.arange(len(images)), 32, None)
        indices = BatchIndices(np.arange(len(images)), np.ones(len(images), np.float32))
        seen = normalise(next(load([[indices]], 1)).pixels[32], student.mean, student.std)
    student.model.eval()
    assert not student.model(seen).any()
    set_head(student, *probe_weights(student, images, 5, config.evaluate, torch.device("cpu")))
    pooled = before.model(seen).numpy()
    mean, std = pooled.mean(0), pooled.std(0)
    regression = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit((pooled - mean) / std, images.labels)
    wanted = torch.from_numpy(regression.predict_proba((pooled - mean) / std)).float()
    logits = student.model(seen)
    assert wanted.amax(1).mean() > 0.8 and int(logits.argmax(1).max()) == 3
    torch.testing.assert_close(logits[:, :4].softmax(1), wanted, atol=0.01, rtol=0)


def step_of(config: FinetuneConfig, count: int, filling: int = 0, step: int = 3) -> tuple[Batch, Batch]:
    """A batch of images that hold their number, with labels 0, 1, 2, 0 ..., and the same mixed."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
    batch = Batch({8: pixels}, [], torch.ones(count), torch.arange(count) % 3, filling, step=step)
    return batch, Mixing(config, 3)(batch)


def test_mixup_by_hand() -> None:
    """Neighbours share one lambda, read off the pixels; labels are smoothed; the last of an odd number stays."""
    batch, mixed = step_of(FinetuneConfig(cutmix=0, smoothing=0.3), 7, filling=2)
    lam = 1 - float(mixed.pixels[8][0, 0, 0, 0])  # 0 · lam + 1 · (1 - lam)
    assert 0 < lam < 1
    smooth = 0.7 * torch.eye(3)[batch.labels] + 0.1
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(mixed.pixels[8][a], torch.full((8, 8, 3), lam * a + (1 - lam) * b))
        torch.testing.assert_close(mixed.labels[a], lam * smooth[a] + (1 - lam) * smooth[b])
    assert torch.equal(mixed.pixels[8][4:], batch.pixels[8][4:].float())
    torch.testing.assert_close(mixed.labels[4:], smooth[4:])


def test_cutmix_by_hand() -> None:
    """A box comes from the neighbour, and the labels have its share of the pixels."""
    _, mixed = step_of(FinetuneConfig(mixup=0, smoothing=0), 4, step=seeded(5))
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        assert set(mixed.pixels[8][a].unique().tolist()) <= {a, b}
        own = float((mixed.pixels[8][a] == a).float().mean())
        expected = torch.zeros(3).index_add(0, torch.tensor([a % 3, b % 3]), torch.tensor([own, 1 - own]))
        torch.testing.assert_close(mixed.labels[a], expected)


def test_mixing_depends_on_seed_and_step_alone() -> None:
    """Not on how the batch is shared out; what NumPy draws besides is as it was."""
    config = FinetuneConfig()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    whole = [step_of(config, 8, step=step)[1] for step in range(6)]
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert len({tuple(batch.labels[0].tolist()) for batch in whole}) == 6
    for step, batch in enumerate(whole):
        half = step_of(config, 8, step=step)[0].map(itemgetter(slice(4, None)))
        part = Mixing(config, 3)(half)
        assert torch.equal(part.pixels[8], batch.pixels[8][4:]) and torch.equal(part.labels, batch.labels[4:])
    plain = step_of(FinetuneConfig(mixup=0, cutmix=0), 8)[1]
    assert torch.equal(plain.labels, mixup_target(torch.arange(8) % 3, 3, smoothing=0.1))
    assert torch.equal(plain.pixels[8], step_of(config, 8)[0].pixels[8])
    never = step_of(FinetuneConfig(mix_prob=0), 8)[1]
    assert torch.equal(never.labels, plain.labels)


def test_views_are_new_in_every_epoch(world: Path) -> None:
    """And are those that draw_view draws from key and epoch."""
    images, settings = index_images(shards(world)), FinetuneConfig(batch_size=4, seed=seeded(1))
    numbers = np.array([7, 2, 30, 31, 55, 4])
    with ImageFile(images) as files:
        load = LabelledLoader(files, numbers, 32, settings)

        def pixels(epoch: int) -> torch.Tensor:
            return load.pixels(BatchIndices(np.array([0, 3]), np.ones(2, np.float32), epoch))[1]

        first, again, later = pixels(0), pixels(0), pixels(1)
        for row, number in enumerate((7, 31)):
            image = files.read(number)
            view = draw_view(views_of(settings, 32), images.keys[number], 1, image.size)
            assert np.array_equal(later[row].numpy(), apply_view(image, view, 32))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_randaugment_is_timms() -> None:
    """Its operations, how often and at which spread they are applied, and what they take; only the draws are ours."""
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert [op.name for op in theirs.ops] == list(OPERATIONS)
    assert {(op.prob, op.magnitude_std) for op in theirs.ops} == {(0.5, 0.5)}
    for name, magnitude in itertools.product(OPERATIONS, (0.0, 2.5, 9.0, 10.0)):
        drawn = LEVEL_TO_ARG[name]
        wanted = {()} if drawn is None else {drawn(magnitude, {}) for _ in range(64)}
        np.testing.assert_allclose(sorted({arguments(name, magnitude, sign) for sign in (1, -1)}), sorted(wanted))


def test_stronger_augmentation_depends_on_seed_key_and_epoch_alone(world: Path) -> None:
    """Not on threads, on the order and division of batches, or on generators that others share."""
    images, settings = index_images(shards(world)), FinetuneConfig(randaugment=(2, 9), erasing=0.5, seed=seeded(1))
    count = 40

    def views(settings: FinetuneConfig, parts: Sequence[Sequence[int]], workers: int, epoch: int = 0) -> torch.Tensor:
        load = LabelledLoader(files, np.arange(count), 32, settings)
        lists = [[BatchIndices(np.array(part), np.ones(len(part), np.float32), epoch)] for part in parts]
        return torch.cat([batch.pixels[32] for batch in load(lists, workers)])

    shared = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with ImageFile(images) as files:
        one = views(settings, [range(count)], 1)
        many = views(settings, [[number] for number in reversed(range(count))], 4).flip(0)
        later = views(settings, [range(count)], 1, epoch=1)
        other = views(settings.model_copy(update={"seed": seeded(2)}), [range(count)], 1)
        plain = views(settings.model_copy(update={"randaugment": None, "erasing": 0.0}), [range(count)], 1)
        erased = views(settings.model_copy(update={"randaugment": None}), [range(count)], 1)
        alone = views(settings.model_copy(update={"erasing": 0.0}), [range(count)], 1)
    assert torch.equal(one, many) and not torch.equal(one, later) and not torch.equal(one, other)
    assert shared == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    # What one of them draws does not change what the other does: views are the same where nothing is erased.
    same = (erased == plain).flatten(1).all(1)
    assert 0 < int(same.sum()) < count
    assert torch.equal(one[same], alone[same])


def test_erasing_by_its_figures() -> None:
    """How often, how large and with which noise; the view that it is given stays as it is."""
    view, shares, noise = np.zeros((40, 60, 3), np.uint8), [], []
    for number in range(400):
        erased = erase(view, 0.25, generator(seeded(3), f"image {number}", 0, 4))
        changed = erased.any(-1)
        if changed.any():
            rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
            inside = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert changed.sum() > 0.99 * inside[..., 0].size  # all of a rectangle, and nothing else
            shares.append(inside[..., 0].size / changed.size)
            noise.append(inside.flatten())
    assert not view.any() and 0.14 < len(shares) / 400 < 0.36
    assert 0.015 < min(shares) < 0.1 and 0.25 < max(shares) < 0.35
    values = np.concatenate(noise)
    assert abs(values.mean() - 127.5) < 2 and abs(values.std() - 73.9) < 2 and values.max() == 255


def teacher_settings(**keys: object) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"kd": "soft", **keys})


def test_a_teacher_says_what_its_head_does() -> None:
    """In the order of the labels, for views of any size; a label that its head does not know has no probability."""
    vit = make_vit(img_size=48)
    teacher = HeadTeacher(vit, [4, -1, 0], teacher_settings(), torch.device("cpu"))
    pixels = torch.randint(256, (6, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        whole = vit.model(normalise(pixels, vit.mean, vit.std))
    found = teacher.logits(pixels)
    assert torch.equal(found[:, [0, 2]], whole[:, [4, 0]]) and bool((found[:, 1] == -torch.inf).all())
    assert not found.requires_grad and not vit.model.training
    small = [Image.fromarray(image.numpy()).resize((32, 32)) for image in pixels]
    large = [np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in small]
    ours, theirs = (teacher.logits(torch.from_numpy(np.stack(x))) for x in ([np.asarray(i) for i in small], large))
    torch.testing.assert_close(ours, theirs, atol=0.02 * float(theirs[:, [0, 2]].std()), rtol=0)


def test_what_is_learned_of_a_teacher_by_hand() -> None:
    ours, theirs = torch.randn(2, 7, 3)
    theirs[:, 1] = -torch.inf
    settings = teacher_settings(kd_temperature=2)
    soft = HeadTeacher(make_vit(), [4, -1, 0], settings, torch.device("cpu")).losses(ours, theirs)
    p, q = (theirs / 2).softmax(1)[:, [0, 2]], (ours / 2).softmax(1)[:, [0, 2]]
    torch.testing.assert_close(soft, 4 * (p * (p / q).log()).sum(1))
    hard = HeadTeacher(make_vit(), [4, -1, 0], teacher_settings(kd="hard"), torch.device("cpu")).losses(ours, theirs)
    first = torch.where(theirs[:, 0] > theirs[:, 2], 0, 2)
    torch.testing.assert_close(hard, -ours.log_softmax(1)[torch.arange(7), first])


@pytest.mark.parametrize("kd", ["soft", "hard"])
def test_a_student_comes_to_say_what_its_teacher_says(kd: str) -> None:
    """On random images, with labels that say nothing: they have no share of the loss. The teacher stays as it is."""
    vit, student = make_vit(seed=3), make_vit(embed_dim=12, depth=2, num_classes=4)
    vit.model.head.weight.data *= 30  # it says something of noise
    before = {name: tensor.clone() for name, tensor in vit.model.state_dict().items()}
    cpu, settings = torch.device("cpu"), teacher_settings(kd=kd, kd_weight=1)
    learner = Classifier(student, cpu, None, HeadTeacher(vit, [1, 2, 3, 4], settings, cpu))
    assert not [name for name in learner.state_dict() if not name.startswith("student.")]
    weights = torch.full((24,), 1 / 24)
    batch = Batch({32: torch.randint(256, (24, 32, 32, 3), dtype=torch.uint8)}, [], weights, torch.arange(24) % 4)
    optimiser, seen = torch.optim.Adam(learner.parameters(), 3e-3), []
    for _ in range(40):
        losses, _ = learner.train()(batch)
        assert losses["ce"] == 0
        optimiser.zero_grad()
        losses["kd"].backward()
        optimiser.step()
        seen.append(float(losses["kd"].detach()))
    assert seen[-1] < 0.3 * seen[0]
    if kd == "soft":
        compiled = torch.compile(learner, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(batch)[0]["kd"], learner(batch)[0]["kd"])
    assert set(learner.eval()(batch)[0]) == {"ce"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.model.state_dict().items())


def taught(folder: Path) -> list[str]:
    """The settings of a training with all augmentation, and with the teacher that the run learned from."""
    (folder / "map.json").write_text("[3, 1, 0, 4]")  # it has 5 classes, and the images have 4
    teacher = ["finetune.kd=soft", "finetune.kd_temperature=2", f"finetune.class_map={folder / 'map.json'}"]
    return ["finetune.randaugment=[2,9]", "finetune.erasing=0.25", *teacher]


def changed(config: Config, **keys: object) -> Config:
    """A configuration with other keys of finetune."""
    return config.changed(finetune=keys)


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The process dies after so many checkpoints."""
    save, saves = Checkpoint.save, iter(range(1, 1000))

    def die(self: Checkpoint, step: int, write: bool) -> None:
        save(self, step, write)
        if next(saves) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", die)


@pytest.mark.parametrize(("after", "epochs"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_it_resumes_exactly(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, epochs: int
) -> None:
    """From the midst of an epoch, or after an epoch that may be the best; and with nothing else than it began with."""
    sets = ["finetune.checkpoint_minutes=1e-9", "finetune.ema=0.9", "finetune.drop_path=0.2", "finetune.keep=best"]
    sets += ["finetune.holdout=0.2", "finetune.batch_size=40", "finetune.color=[0.2,0.2,0.2,0.1]"]
    sets += taught(tmp_path)
    config = world_config(world, *SETS, *sets, f"finetune.epochs={epochs}")
    whole = finetune(config, run, shards(world), tmp_path / "whole")
    part = tmp_path / "part"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, after)
        finetune(config, run, shards(world), part)
    assert not (part / "run.json").exists()
    with pytest.raises(UserError, match="was started with another image set; use that or --overwrite"):
        finetune(config, run, shards(world, "test"), part, mode="resume")
    other = changed(config, mixup=0.5)
    with pytest.raises(UserError, match="was started with finetune.mixup 0.8, not 0.5"):
        finetune(other, run, shards(world), part, mode="resume")
    with pytest.raises(UserError, match=r"was started with finetune.kd soft, not hard"):
        finetune(changed(config, kd="hard"), run, shards(world), part, mode="resume")
    vit = make_vit(seed=5)
    save_backbone(vit, vit.model.state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match=r"was started with another finetune\.teacher; use that or --overwrite"):
        finetune(changed(config, teacher=str(tmp_path / "other")), run, shards(world), part, mode="resume")
    (tmp_path / "other.json").write_text("[3, 1, 0, 2]")
    with pytest.raises(UserError, match=r"was started with another finetune\.class_map; use that or --overwrite"):
        finetune(changed(config, class_map=tmp_path / "other.json"), run, shards(world), part, mode="resume")
    probed = config.changed(evaluate={"strengths": (2.0,)})
    with pytest.raises(UserError, match=r"was started with evaluate.strengths \[1.0\], not \[2.0\]"):
        finetune(probed, run, shards(world), part, mode="resume")
    with pytest.raises(UserError, match="continue it with --resume, replace it with --overwrite"):
        finetune(config, run, shards(world), part)
    with pytest.raises(UserError, match="repeat its finetune command with --resume"):
        evaluate(config, part, None, shards(world), "head")
    # The head's linear probe reads no other key of this section.
    later = config.changed(evaluate={"neighbours": 3, "tokens": "norm"})
    resumed = finetune(later, run, shards(world), part, mode="resume")
    assert resumed.finetuned.kept_epoch == whole.finetuned.kept_epoch
    one, two = (tree_bytes(tmp_path / name, "run.json", "provenance.json", "log.jsonl") for name in ("whole", "part"))
    assert one == two
    # A finished run is left as it is, and needs no teacher any more; another one is still refused.
    assert finetune(config, run, shards(world), part, mode="resume").finetuned == resumed.finetuned
    with pytest.raises(UserError, match=r"was started with another finetune\.teacher; use that or --overwrite"):
        finetune(changed(config, teacher=str(tmp_path / "other")), run, shards(world), part, mode="resume")
    shutil.rmtree(tmp_path / "other")
    gone = changed(config, teacher=str(tmp_path / "other"))
    assert finetune(gone, run, shards(world), part, mode="resume").finetuned == resumed.finetuned


@pytest.mark.slow
def test_two_processes(world: Path, run: Path, config_file: Path, tmp_path: Path) -> None:
    """They do what one does, to rounding. The last batch of an epoch is odd and smaller."""
    sets = [*SETS, "finetune.epochs=2", "finetune.batch_size=16", "finetune.holdout=0.13", *taught(tmp_path)]
    finetune(world_config(world, *sets), run, shards(world), tmp_path / "one")
    options = ["--config", config_file, *(word for value in sets for word in ("--set", value))]
    launch(2, "finetune", run, "--train", shards(world), "--out", tmp_path / "two", *options)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for key in ("loss", "held_out_loss"):
        one, two = (torch.tensor([line[key] for line in log if key in line]) for log in logs)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
    # Weights whose gradient is rounding alone, such as the bias of keys, walk at random under Adam; outputs do not.
    images = torch.randn(8, 3, 32, 32)
    finetune(world_config(world, *sets, "finetune.lr=1e-12"), run, shards(world), tmp_path / "start")
    one, two, start = (load_saved(tmp_path / name / "student").model(images) for name in ("one", "two", "start"))
    assert (one - two).abs().max() < 0.01 * (one - start).abs().max()


class Commands:
    """Runs commands in this process, on the world's configuration."""

    def __init__(self, config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.options = ["--config", config_file, *(word for value in SETS for word in ("--set", value))]
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *args: object) -> Any:
        """The JSON that a command prints."""
        given = [] if args[0] == "report" else self.options
        assert run_singer(self.monkeypatch, *args, *given, "--json") == 0, self.capfd.readouterr().err
        return json.loads(self.capfd.readouterr().out.splitlines()[-1])


@pytest.fixture
def told(config_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Commands:
    return Commands(config_file, monkeypatch, capfd)


@pytest.mark.slow
def test_commands_take_what_finetune_makes(world: Path, run: Path, tmp_path: Path, told: Commands) -> None:
    """It is exported with its card, embeds, is reported beside the run that it began as, and can begin another run."""
    out, (train, test) = tmp_path / "tuned", (world / "images" / split for split in ("train", "test"))
    teaching = [word for value in taught(tmp_path) for word in ("--set", value)]
    made = told("finetune", run, "--train", train, "--test", test, "--on-error", "skip", "--out", out, *teaching)
    told("export", out, "--to", "hf", "--out", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_classes"] == 4
    assert config["pretrained_cfg"]["label_names"] == [f"class{n}" for n in range(4)]
    card = (tmp_path / "hf" / "README.md").read_text()
    top1 = f"{made['test']['top1']:.1f} % top-1"
    labels = "soft labels by the head of vit_tiny_patch16_224, weights"
    for text in ("with a head of 4 classes", "(batch, 4)", "100 images of 4 classes", labels, top1):
        assert text in card, text
    told("embed", out, test, "--out", tmp_path / "vectors.npy")
    assert np.load(tmp_path / "vectors.npy").shape == (40, 12)
    page = tmp_path / "report.html"
    told("report", run, out, "--cache", world / "cache", "--records", 4, "--out", page)
    assert "fine-tuned" in page.read_text()
    begun = told("distill", "--cache", world / "cache", "--out", tmp_path / "again", "--set", f"student.init={out}")
    assert begun["finetuned"] is None
    assert told("finetune", out, "--train", shards(world), "--out", tmp_path / "twice")["finetuned"]["classes"] == 4


@pytest.mark.slow
def test_maps_and_wider_exits(world: Path, tmp_path: Path) -> None:
    """A student of feature maps with batch normalisation, and one whose last block is wider, at another size."""
    own = [f"student.{key}=null" for key in ("dim", "depth", "heads", "patch_size")]
    for name, sets in (("maps", ["student.name=test_resnet", *own]), ("exit", ["student.exit=wide"])):
        distill(world_config(world, *sets, "distill.epochs=1"), world / "cache", tmp_path / name)
        config = world_config(world, *SETS, "finetune.epochs=1", "finetune.image_size=40", "finetune.drop_path=0.1")
        out = tmp_path / f"tuned-{name}"
        finetune(config, tmp_path / name, shards(world), out)
        student = load_saved(out / "student")
        assert student.image_size == 40 and student.model(torch.zeros(1, 3, 40, 40)).shape == (1, 4)


ERRORS: dict[str, tuple[list[str], str]] = {
    "image size": (["finetune.image_size=30"], "image_size 30 is not a multiple of the patch size 8"),
    "held out": (["finetune.holdout=0.999"], "finetune.holdout: all 100 images would be held out"),
    "warm-up": (["finetune.warmup_epochs=9"], "--set finetune.warmup_epochs=0.2"),
    "best": (["finetune.keep=best"], "hold some out (--set finetune.holdout=0.02)"),
    "range": (["finetune.scale=[0.5, 0.1]"], "finetune.scale: 0.5 is larger than 0.1"),
    "tracker": (["finetune.trackers=[nothing]"], "finetune.trackers: unknown 'nothing'"),
    "no teacher": (["finetune.teacher=run"], "finetune.teacher: no teacher takes part; set finetune.kd=soft (or hard)"),
    "hard": (
        ["finetune.kd=hard", "finetune.kd_temperature=2"],
        "kd_temperature: 2 is for soft labels; set finetune.kd",
    ),
}


def test_too_few_images_to_choose_a_probe(world: Path, run: Path, tmp_path: Path) -> None:
    """This is said before anything is written, so that the remedy works as printed."""
    for name in ("class0", "class1"):
        source = next((world / "images" / "train" / name).iterdir())
        (tmp_path / "two" / name).mkdir(parents=True)
        shutil.copyfile(source, tmp_path / "two" / name / source.name)
    sets = ["finetune.epochs=1", "finetune.batch_size=2", "finetune.warmup_epochs=0", "finetune.trackers=[]"]
    with pytest.raises(UserError, match="has 2 images: .* or one strength: --set 'evaluate.strengths") as caught:
        finetune(world_config(world, *sets, "evaluate.strengths=[0.01, 1]"), run, tmp_path / "two", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    remedy = str(caught.value).rpartition("--set ")[2].strip("'")
    assert finetune(world_config(world, *sets, remedy), run, tmp_path / "two", tmp_path / "out").finetuned.images == 2


@pytest.mark.parametrize("what", ERRORS)
def test_settings_that_do_not_fit(world: Path, run: Path, tmp_path: Path, what: str) -> None:
    sets, message = ERRORS[what]
    with pytest.raises(UserError) as error:
        finetune(world_config(world, *SETS, *sets), run, shards(world), tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


TEACHERS: dict[str, tuple[list[str], str]] = {
    "classes": ([], "--train has 4 classes, but the head of .* has 5 classes; .* give finetune.class_map"),
    "unmapped": (["[1, 2, 3]"], "finetune.class_map: .* has no entry for label 3 of --train; add it"),
    "unknown": (["[1, 2, 3, 5]"], "finetune.class_map: .* names class 5, but the head has 0 to 4"),
    "twice": (["[1, 2, 3, 1]"], "finetune.class_map: .* has class 1 for several labels; give each its own"),
    "no map": (["{}"], "finetune.class_map: .* must be JSON such as"),
}


def test_weights_of_no_teacher(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = world / "teacher" / "model.safetensors"
    words = ["finetune", run, "--train", shards(world), "--out", tmp_path / "out", "--weights", weights]
    assert run_singer(monkeypatch, *words) == 2
    assert "no teacher takes part; give --set finetune.kd=soft (or hard), or leave it out" in capfd.readouterr().err


@pytest.mark.parametrize("what", TEACHERS)
def test_classes_that_a_teacher_does_not_know(world: Path, run: Path, tmp_path: Path, what: str) -> None:
    texts, message = TEACHERS[what]
    sets = ["finetune.kd=soft"]
    for text in texts:
        (tmp_path / "map.json").write_text(text)
        sets.append(f"finetune.class_map={tmp_path / 'map.json'}")
    with pytest.raises(UserError, match=message):
        finetune(world_config(world, *SETS, *sets), run, shards(world), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_teacher_takes_part(world: Path, run: Path, tmp_path: Path) -> None:
    """That of the run, as it was cached, or a named one, whose classes may have names; others are refused."""
    images, result = index_images(shards(world)), load_result(run)
    mapped = next(value for value in taught(tmp_path) if "class_map" in value)

    def found(*sets: str, weights: Path | None = None) -> tuple[Any, list[int]]:
        settings = world_config(world, "finetune.kd=hard", *sets).finetune
        teacher = teacher_of_labels(settings, weights, run, result, images)
        assert teacher is not None
        return teacher

    assert teacher_of_labels(FinetuneConfig(), None, run, result, images) is None
    own, classes = found(mapped)
    known = safetensors.torch.load_file(world / "teacher" / "model.safetensors")
    assert classes == [3, 1, 0, 4] and torch.equal(own.model.state_dict()["head.weight"], known["head.weight"])
    vit = make_vit(num_classes=4, seed=5)
    vit.model.pretrained_cfg["label_names"] = [f"class{n}" for n in (3, 2, 1, 0)]
    save_backbone(vit, vit.model.state_dict(), tmp_path / "named")
    named, classes = found(f"finetune.teacher={tmp_path / 'named'}")
    assert classes == [3, 2, 1, 0] and torch.equal(named.model.head.weight, vit.model.head.weight)
    refused = [
        (
            [f"finetune.teacher={run}"],
            None,
            "has no classification head; name a classifier: --set finetune",
        ),
        (["finetune.teacher=nothing"], None, "finetune.teacher: nothing does not exist, and timm has no model"),
        (
            [mapped],
            tmp_path / "named" / "model.safetensors",
            "finetune.kd: .*; give its weights with --weights FILE",
        ),
    ]
    for sets, weights, message in refused:
        with pytest.raises(UserError, match=message):
            found(*sets, weights=weights)
    link = result.teachers[0]
    result = replace(result, teachers=[replace(link, cache_place=str(tmp_path / "gone"), cache="gone")])
    with pytest.raises(UserError, match=r"the cache that .* is not at .*gone; name a classifier: --set finetune"):
        found(mapped)
    result = replace(result, teachers=[link, link])
    with pytest.raises(UserError, match="learned from 2 teachers; name a classifier"):
        found(mapped)


def test_images_and_runs_that_do_not_fit(world: Path, run: Path, tmp_path: Path) -> None:
    """Each is told in one line, and nothing is written."""
    config, out = world_config(world, *SETS), tmp_path / "out"
    flat, one = tmp_path / "flat", tmp_path / "one"
    for folder in (flat, one / "class0"):
        shutil.copytree(world / "images" / "train" / "class0", folder)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "run.json").unlink()
    own = shutil.copytree(run, tmp_path / "own")
    described = json.loads((own / "student" / "config.json").read_text())
    (own / "student" / "config.json").write_text(json.dumps({**described, "architecture": "own:Net"}))
    data = shards(world)
    gone = shutil.copytree(run, tmp_path / "gone")
    (gone / "student" / "model.safetensors").unlink()
    given: list[tuple[Path, str | Path, Path, str]] = [
        (gone, data, out, "gone is not a finished run: .*model.safetensors is missing"),
        (run, flat, out, "--train: 25 of 25 images have no .cls label"),
        (run, one, out, "--train has images of one class only; a classifier needs two"),
        (unfinished, data, out, "unfinished is not a finished run: it has no run.json"),
        (own, data, out, "own:Net, and finetune gives heads to models of timm only"),
        (run, data, run / "tuned", "overlaps the input"),
    ]
    for place, train, to, message in given:
        with pytest.raises(UserError, match=message):
            finetune(config, place, train, to)
    assert not out.exists()


def test_what_is_wrong_with_the_test_is_found_before_training(world: Path, run: Path, tmp_path: Path) -> None:
    train, test, out = tmp_path / "train", tmp_path / "test", tmp_path / "out"
    shutil.copytree(world / "train", train, ignore=shutil.ignore_patterns("classes.json"))
    shutil.copytree(world / "test", test)
    (test / "classes.json").write_text(json.dumps([f"class{n}" for n in range(9)]))
    few = tmp_path / "few"
    shutil.copytree(world / "images" / "train", tmp_path / "images", ignore=shutil.ignore_patterns("class3"))
    prepare(config_with(f"prepare.classes={world / 'train' / 'classes.json'}"), tmp_path / "images", few)
    size = ["evaluate.image_size=30"], "not a multiple of the patch size"
    given = [
        (train, str(test / "*.tar"), [], "--test has 9 classes, but --train has"),
        (
            train,
            shards(world),
            ["evaluate.class_map=map.json"],
            r"evaluate\.class_map: the classes of finetune are those",
        ),
        (train, shards(world), *size),
        # The head has a class for each name. Without names, it has those of the labels.
        (few, shards(world), *size),
        (
            shutil.copytree(few, tmp_path / "nameless"),
            shards(world),
            [],
            "--test has class 'class3', of which --train has no image",
        ),
    ]
    (tmp_path / "nameless" / "classes.json").unlink()
    for images, tested, sets, message in given:
        with pytest.raises(UserError, match=message):
            finetune(world_config(world, *SETS, *sets), run, str(images / "*.tar"), out, tested)
    assert not out.exists()


def test_two_lists_of_one_folder_are_two_sets(world: Path, run: Path, tmp_path: Path) -> None:
    """The run's cache has no image of world's test folder, of which one list trains and the other tests."""
    files = sorted((world / "images" / "test").rglob("*.png"))
    for name, chosen in (("learned.txt", files[::2]), ("tested.txt", files[1::2])):
        (tmp_path / name).write_text("".join(f"{path} {path.parent.name}\n" for path in chosen))
    config = world_config(world, *SETS, "finetune.epochs=1", "finetune.warmup_epochs=0")
    learned, tested = str(tmp_path / "learned.txt"), str(tmp_path / "tested.txt")
    result = finetune(config, run, learned, tmp_path / "out", tested)
    assert result.test is not None and result.test.learned_from_test == "no"
    assert evaluate(config, tmp_path / "out", None, learned, "head").learned_from_test == "yes"


def test_a_second_one_knows_what_the_first_has_learned_from(world: Path, run: Path, tmp_path: Path) -> None:
    config, seen = (
        world_config(world, *SETS, "finetune.epochs=1", "finetune.warmup_epochs=0"),
        str(world / "test" / "*.tar"),
    )
    finetune(config, run, seen, tmp_path / "first")
    result = finetune(config, tmp_path / "first", shards(world), tmp_path / "second", seen)
    assert result.test is not None and result.test.learned_from_test == "yes"
