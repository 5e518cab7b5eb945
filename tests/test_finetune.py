"""Fine-tuning with labels: it learns, a run resumes, and other commands take what it makes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_vit, run_singer, shards, tree_bytes, world_config
from finetuning import SETS, WEIGHTS, changed, taught
from ranks import launch
from sklearn.linear_model import LogisticRegression

from pipeline.data import ImageFile, index_images
from pipeline.data.sampler import BatchIndices
from pipeline.data.views import normalise
from pipeline.evaluation.linear_head import probe_weights
from pipeline.evaluation.own_head import OwnHead
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_saved
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.finetune import finetune
from pipeline.students.with_head import set_head, student_with_head
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.finetuning.labelled import LabelledLoader
from pipeline.training.run_log import read_log
from singer.errors import UserError


def test_head_and_student_learn(
    world: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a head of zeros the loss falls, and images are told apart far above chance; no weight stays as it was.

    The folders name the classes, and the test is that of `evaluate --task head`.
    """
    sets = ["finetune.head=zeros", "finetune.epochs=6", "finetune.lr=1e-2", "finetune.mixup=0", "finetune.cutmix=0"]
    config = world_config(world, *SETS, *sets, "finetune.scale=[0.7, 1]", "finetune.holdout=0.2")
    out, (train, test) = tmp_path / "out", (world / "images" / split for split in ("train", "test"))
    made = finetune(config, distilled, train, out, test)
    assert capsys.readouterr().err.count("note: 24 steps of training may teach little") == 1
    lines = [line for line in read_log(out / "log.jsonl") if "held_out_top1" in line]
    assert len(lines) == 6 and lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    assert lines[-1]["held_out_top1"] > 60 and lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert (made.finetuned.classes, made.finetuned.images, made.finetuned.steps) == (4, 80, 24)
    before, after = (safetensors.torch.load_file(place / WEIGHTS) for place in (distilled, out))
    assert set(after) - set(before) == {"head.weight", "head.bias"}
    assert not [name for name, x in before.items() if torch.equal(after[name], x)]
    assert made.test is not None and made.test.top1 > 60 and made.test.learned_from_test == "no"
    again = evaluate(config, out, None, test, "head")
    assert isinstance(again, OwnHead) and again.top1 == made.test.top1
    assert len(list(out.glob("evaluate-*.json"))) == 1
    assert evaluate(config, out, None, train, "head").learned_from_test == "yes"


def test_a_head_starts_as_the_linear_probe(world: Path, distilled: Path) -> None:
    """The student says what scikit-learn does of its pooled output; a class without images is never said."""
    config, images = world_config(world, *SETS), index_images(shards(world))
    before, student = load_saved(distilled / "student"), student_with_head(distilled / "student", config.finetune, 5)
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
    world: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, epochs: int
) -> None:
    """From the midst of an epoch, or after an epoch that may be the best; and with nothing else than it began with."""
    sets = ["finetune.checkpoint_minutes=1e-9", "finetune.ema=0.9", "finetune.drop_path=0.2", "finetune.keep=best"]
    sets += ["finetune.holdout=0.2", "finetune.batch_size=40", "finetune.color=[0.2,0.2,0.2,0.1]"]
    sets += taught(tmp_path)
    config = world_config(world, *SETS, *sets, f"finetune.epochs={epochs}")
    whole = finetune(config, distilled, shards(world), tmp_path / "whole")
    part = tmp_path / "part"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, after)
        finetune(config, distilled, shards(world), part)
    assert not (part / "run.json").exists()
    with pytest.raises(UserError, match="was started with another image set; use that or --overwrite"):
        finetune(config, distilled, shards(world, "test"), part, mode="resume")
    other = changed(config, mixup=0.5)
    with pytest.raises(UserError, match="was started with finetune.mixup 0.8, not 0.5"):
        finetune(other, distilled, shards(world), part, mode="resume")
    with pytest.raises(UserError, match=r"was started with finetune.kd soft, not hard"):
        finetune(changed(config, kd="hard"), distilled, shards(world), part, mode="resume")
    vit = make_vit(seed=5)
    save_backbone(vit, vit.model.state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match=r"was started with another finetune\.teacher; use that or --overwrite"):
        finetune(changed(config, teacher=str(tmp_path / "other")), distilled, shards(world), part, mode="resume")
    (tmp_path / "other.json").write_text("[3, 1, 0, 2]")
    with pytest.raises(UserError, match=r"was started with another finetune\.class_map; use that or --overwrite"):
        finetune(changed(config, class_map=tmp_path / "other.json"), distilled, shards(world), part, mode="resume")
    probed = config.changed(evaluate={"strengths": (2.0,)})
    with pytest.raises(UserError, match=r"was started with evaluate.strengths \[1.0\], not \[2.0\]"):
        finetune(probed, distilled, shards(world), part, mode="resume")
    with pytest.raises(UserError, match="continue it with --resume, replace it with --overwrite"):
        finetune(config, distilled, shards(world), part)
    with pytest.raises(UserError, match="repeat its finetune command with --resume"):
        evaluate(config, part, None, shards(world), "head")
    # The head's linear probe reads no other key of this section.
    later = config.changed(evaluate={"neighbours": 3, "tokens": "norm"})
    resumed = finetune(later, distilled, shards(world), part, mode="resume")
    assert resumed.finetuned.kept_epoch == whole.finetuned.kept_epoch
    one, two = (tree_bytes(tmp_path / name, "run.json", "provenance.json", "log.jsonl") for name in ("whole", "part"))
    assert one == two
    # A finished run is left as it is, and needs no teacher any more; another one is still refused.
    assert finetune(config, distilled, shards(world), part, mode="resume").finetuned == resumed.finetuned
    with pytest.raises(UserError, match=r"was started with another finetune\.teacher; use that or --overwrite"):
        finetune(changed(config, teacher=str(tmp_path / "other")), distilled, shards(world), part, mode="resume")
    shutil.rmtree(tmp_path / "other")
    gone = changed(config, teacher=str(tmp_path / "other"))
    assert finetune(gone, distilled, shards(world), part, mode="resume").finetuned == resumed.finetuned


@pytest.mark.slow
def test_two_processes(world: Path, distilled: Path, config_file: Path, tmp_path: Path) -> None:
    """They do what one does, to rounding. The last batch of an epoch is odd and smaller."""
    sets = [*SETS, "finetune.epochs=2", "finetune.batch_size=16", "finetune.holdout=0.13", *taught(tmp_path)]
    finetune(world_config(world, *sets), distilled, shards(world), tmp_path / "one")
    options = ["--config", config_file, *(word for value in sets for word in ("--set", value))]
    launch(2, "finetune", distilled, "--train", shards(world), "--out", tmp_path / "two", *options)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for key in ("loss", "held_out_loss"):
        one, two = (torch.tensor([line[key] for line in log if key in line]) for log in logs)
        torch.testing.assert_close(two, one, rtol=1e-4, atol=0)
    # Weights whose gradient is rounding alone, such as the bias of keys, walk at random under Adam; outputs do not.
    images = torch.randn(8, 3, 32, 32)
    finetune(world_config(world, *sets, "finetune.lr=1e-12"), distilled, shards(world), tmp_path / "start")
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
def test_commands_take_what_finetune_makes(world: Path, distilled: Path, tmp_path: Path, told: Commands) -> None:
    """It is exported with its card, embeds, is reported beside the run that it began as, and can begin another run."""
    out, (train, test) = tmp_path / "tuned", (world / "images" / split for split in ("train", "test"))
    teaching = [word for value in taught(tmp_path) for word in ("--set", value)]
    made = told("finetune", distilled, "--train", train, "--test", test, "--on-error", "skip", "--out", out, *teaching)
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
    told("report", distilled, out, "--cache", world / "cache", "--records", 4, "--out", page)
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


def test_two_lists_of_one_folder_are_two_sets(world: Path, distilled: Path, tmp_path: Path) -> None:
    """The run's cache has no image of world's test folder, of which one list trains and the other tests."""
    files = sorted((world / "images" / "test").rglob("*.png"))
    for name, chosen in (("learned.txt", files[::2]), ("tested.txt", files[1::2])):
        (tmp_path / name).write_text("".join(f"{path} {path.parent.name}\n" for path in chosen))
    config = world_config(world, *SETS, "finetune.epochs=1", "finetune.warmup_epochs=0")
    learned, tested = str(tmp_path / "learned.txt"), str(tmp_path / "tested.txt")
    result = finetune(config, distilled, learned, tmp_path / "out", tested)
    assert result.test is not None and result.test.learned_from_test == "no"
    assert evaluate(config, tmp_path / "out", None, learned, "head").learned_from_test == "yes"


def test_a_second_one_knows_what_the_first_has_learned_from(world: Path, distilled: Path, tmp_path: Path) -> None:
    config, seen = (
        world_config(world, *SETS, "finetune.epochs=1", "finetune.warmup_epochs=0"),
        str(world / "test" / "*.tar"),
    )
    finetune(config, distilled, seen, tmp_path / "first")
    result = finetune(config, tmp_path / "first", shards(world), tmp_path / "second", seen)
    assert result.test is not None and result.test.learned_from_test == "yes"
