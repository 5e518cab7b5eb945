"""Fine-tuning with the labels of a teacher: what its head says, what is learned of it, and which one takes part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_vit, run_singer, shards, world_config
from finetuning import SETS, taught
from PIL import Image

from pipeline.config import FinetuneConfig
from pipeline.data import index_images
from pipeline.data.views import normalise
from pipeline.models.backbone import save_backbone
from pipeline.stages.finetune import finetune, teacher_of_labels
from pipeline.training.batch import Batch
from pipeline.training.finetuning.classifier import Classifier
from pipeline.training.finetuning.head_teacher import HeadTeacher
from pipeline.training.run_directory import load_result
from singer.errors import UserError


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


TEACHERS: dict[str, tuple[list[str], str]] = {
    "classes": ([], "--train has 4 classes, but the head of .* has 5 classes; .* give finetune.class_map"),
    "unmapped": (["[1, 2, 3]"], "finetune.class_map: .* has no entry for label 3 of --train; add it"),
    "unknown": (["[1, 2, 3, 5]"], "finetune.class_map: .* names class 5, but the head has 0 to 4"),
    "twice": (["[1, 2, 3, 1]"], "finetune.class_map: .* has class 1 for several labels; give each its own"),
    "no map": (["{}"], "finetune.class_map: .* must be JSON such as"),
}


def test_weights_of_no_teacher(
    world: Path, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = world / "teacher" / "model.safetensors"
    words = ["finetune", distilled, "--train", shards(world), "--out", tmp_path / "out", "--weights", weights]
    assert run_singer(monkeypatch, *words) == 2
    assert "no teacher takes part; give --set finetune.kd=soft (or hard), or leave it out" in capfd.readouterr().err


@pytest.mark.parametrize("what", TEACHERS)
def test_classes_that_a_teacher_does_not_know(world: Path, distilled: Path, tmp_path: Path, what: str) -> None:
    texts, message = TEACHERS[what]
    sets = ["finetune.kd=soft"]
    for text in texts:
        (tmp_path / "map.json").write_text(text)
        sets.append(f"finetune.class_map={tmp_path / 'map.json'}")
    with pytest.raises(UserError, match=message):
        finetune(world_config(world, *SETS, *sets), distilled, shards(world), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_teacher_takes_part(world: Path, distilled: Path, tmp_path: Path) -> None:
    """That of the run, as it was cached, or a named one, whose classes may have names; others are refused."""
    images, result = index_images(shards(world)), load_result(distilled)
    mapped = next(value for value in taught(tmp_path) if "class_map" in value)

    def found(*sets: str, weights: Path | None = None) -> tuple[Any, list[int]]:
        settings = world_config(world, "finetune.kd=hard", *sets).finetune
        teacher = teacher_of_labels(settings, weights, distilled, result, images)
        assert teacher is not None
        return teacher

    assert teacher_of_labels(FinetuneConfig(), None, distilled, result, images) is None
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
            [f"finetune.teacher={distilled}"],
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
