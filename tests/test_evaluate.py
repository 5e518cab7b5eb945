"""Probes: right on features with known answers."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import draw_images, make_vit, run_singer, seeded, world_config
from safetensors.torch import save_file
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

import cli
from pipeline.config import Config, dump_config, load_config
from pipeline.data import ImageFile, index_images
from pipeline.data.views import apply_view, crop_view, normalise
from pipeline.evaluation.classification import Classification, accuracy, linear_scores
from pipeline.evaluation.classification import probe as probe_classification
from pipeline.evaluation.context import EvaluationContext
from pipeline.evaluation.domain_shift import DomainShift
from pipeline.evaluation.global_features import features
from pipeline.evaluation.model_inputs import compute_head, compute_tokens, load_inputs
from pipeline.evaluation.own_head import OwnHead
from pipeline.evaluation.retrieval import Retrieval
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_model, load_saved
from pipeline.reports.scores import columns_of, read_figures
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.metrics import knn_scores, retrieval_figures, wilson_percent

CPU = torch.device("cpu")
KINDS = ("block", "norm")
QUICK = "evaluate.strengths=[0.1]"


def blobs(noise: float, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seeded(seed))
    labels = rng.integers(0, classes, 400)
    centres = np.random.default_rng(seeded(99)).normal(size=(classes, 8))
    return torch.from_numpy((centres[labels] + noise * rng.normal(size=(400, 8))).astype("f4")), torch.from_numpy(
        labels
    )


def test_perfect_features_and_chance() -> None:
    settings = load_config().evaluate
    (x, y), (test_x, test_y) = blobs(0.01), blobs(0.01, seed=1)
    assert accuracy(linear_scores(x, y, test_x, 5, settings), test_y)["top1"] == 100
    assert accuracy(knn_scores(x, y, test_x, 5, 20, 0.07), test_y)["top1"] == 100
    # Taught the next label, they say the next label.
    taught = (y + 1) % 5
    for blocks in (linear_scores(x, taught, test_x, 5, settings), knn_scores(x, taught, test_x, 5, 20, 0.07)):
        scores = list(blocks)
        assert accuracy(scores, test_y)["top1"] == 0 and accuracy(scores, (test_y + 1) % 5)["top1"] == 100
    # 20 %, with a standard deviation of 2.
    noise_x, noise_y = torch.randn(400, 8), torch.randint(0, 5, (400,))
    assert accuracy(linear_scores(noise_x, noise_y, torch.randn(400, 8), 5, settings), noise_y)["top1"] < 32


def test_a_file_in_the_place_of_a_folder_is_said_before_the_features(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, sets in ((tmp_path / "file", []), (None, [f"evaluate.features={tmp_path / 'file' / 'deeper'}"])):
        with pytest.raises(UserError, match="file is a file; give another folder"):
            evaluate(world_config(world, *sets), world / "teacher", world / "none", world / "none", out=out)


def test_two_classes_and_classes_without_images() -> None:
    settings = load_config().evaluate
    # One cluster a class: of two, some draws cannot be parted by a line.
    x, y = make_classification(200, 6, n_clusters_per_class=1, random_state=seeded(0), class_sep=4.0)
    x, y = torch.from_numpy(x.astype("f4")), torch.from_numpy(3 * y.astype("i8"))  # labels 0 and 3 of 4
    (scores,) = linear_scores(x, y, x, 4, settings)
    assert scores.shape == (200, 4) and accuracy([scores], y)["top1"] > 90
    assert torch.isinf(scores[:, 1:3]).all()
    two = torch.tensor([0, 1])
    with pytest.raises(
        UserError, match=r"--train has 2 images: .*or one strength: --set 'evaluate\.strengths=\[0\.01\]'"
    ):
        list(linear_scores(x[:2], two, x, 2, settings))
    one = settings.model_copy(update={"strengths": (0.01,)})
    assert all(block.isfinite().all() for block in linear_scores(x[:2], two, x, 2, one))
    with pytest.raises(UserError, match="one class only"):
        list(linear_scores(x, torch.zeros(200, dtype=torch.int64), x, 1, one))


@pytest.mark.parametrize("task", ["classification", "domain-shift"])
def test_too_few_images_are_said_before_features_are_computed(task: str, world: Path, tmp_path: Path) -> None:
    for name in ("class0", "class1"):
        source = next((world / "images" / "train" / name).iterdir())
        (tmp_path / "two" / name).mkdir(parents=True)
        shutil.copyfile(source, tmp_path / "two" / name / source.name)
    config = world_config(world, "evaluate.strengths=[0.01, 1]", f"evaluate.features={tmp_path / 'features'}")
    with pytest.raises(UserError, match="--train has 2 images: .* or one strength"):
        evaluate(config, world / "teacher", tmp_path / "two", tmp_path / "two", task, tmp_path / "out")
    assert not (tmp_path / "features").exists()


def test_a_model_computes_in_16_bits_and_its_head_in_float32(world: Path) -> None:
    images, vit, last = index_images(str(world / "test" / "*.tar")), make_vit(), 3
    halves, wholes = (world_config(world, QUICK, f"evaluate.precision={name}").evaluate for name in ("bf16", "auto"))
    half, whole = (torch.cat([*compute_tokens(vit, images, s, CPU, 1.0)]) for s in (halves, wholes))
    batch = torch.cat([*load_inputs(vit, images, wholes, CPU, 1.0)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = vit.model.forward_features(batch)
        torch.testing.assert_close(half, block_outputs(vit.model, batch, [last])[last].float())
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05 * float(whole.std()))

    logits = torch.cat([*compute_head(vit, images, halves, CPU, 1.0)])
    with torch.no_grad():
        torch.testing.assert_close(logits, vit.model.forward_head(found.float()))
        torch.testing.assert_close(torch.cat([*compute_head(vit, images, wholes, CPU, 1.0)]), vit.model(batch))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_features_and_figures_know_their_precision(world: Path, tmp_path: Path) -> None:
    """What auto is on a CPU, too. Kept features of one precision are not taken for those of another."""
    train, test, kept = str(world / "train" / "*.tar"), str(world / "test" / "*.tar"), tmp_path / "features"
    said = []
    for name in ("auto", "no", "bf16"):
        config = world_config(world, QUICK, f"evaluate.precision={name}", f"evaluate.features={kept}")
        written = evaluate(config, world / "teacher", train, test, out=tmp_path / name).written
        assert written is not None
        said.append((json.loads(written.read_text())["config"]["precision"], len(list(kept.iterdir()))))
    assert said == [("no", 2), ("no", 2), ("bf16", 4)]
    columns = columns_of([read_figures(tmp_path / "auto")])
    assert columns and all("; in float32" in column.probe.words for column in columns)


def test_run_is_probed_and_the_result_kept(world: Path, config: Config, tmp_path: Path) -> None:
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    shards = str(world / "train" / "*.tar"), str(world / "test" / "*.tar")
    result = evaluate(config, tmp_path / "run", *shards)
    assert result.classes == 4 and (result.train_images, result.test_images) == (100, 40)
    assert set(result.linear) == set(result.knn) == {"cls", "mean_patch"}
    assert result.linear["mean_patch"]["top1"] > 60  # colours are easy; chance is 25
    assert result.written is not None
    stored = json.loads(result.written.read_text())
    assert stored["linear"] == result.linear and stored["train"] == [f"train-{i:06d}.tar" for i in range(4)]
    evaluate(config, tmp_path / "run", *shards)
    assert len(list((tmp_path / "run").glob("evaluate-*.json"))) == 1
    alone = {
        kind: evaluate(world_config(world, f"evaluate.tokens={kind}"), tmp_path / "run", *shards) for kind in KINDS
    }
    assert len(list((tmp_path / "run").glob("evaluate-*.json"))) == 3
    assert (alone["block"].linear, alone["block"].knn) == (result.linear, result.knn)
    assert result.normed == {"linear": alone["norm"].linear, "knn": alone["norm"].knn} == stored["normed"]
    assert alone["block"].normed is alone["norm"].normed is None
    # A norm that gives nothing but zeros leaves chance to normed tokens, and nothing changes for raw ones.
    student = load_saved(tmp_path / "run" / "student")
    state = {n: 0 * t if n.startswith("norm.") else t for n, t in student.model.state_dict().items()}
    save_backbone(student, state, tmp_path / "run" / "student")
    silent = evaluate(config, tmp_path / "run", *shards)
    assert (silent.linear, silent.knn) == (result.linear, result.knn) and silent.normed is not None
    for probe in ("linear", "knn"):
        assert {figures["top1"] for figures in silent.normed[probe].values()} == {25}


def test_swapped_shards_are_told(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = world_config(world, "distill.epochs=1")
    distill(config, world / "cache", tmp_path / "run")
    note = "note: the student learned from images of --test; are --train and --test swapped?"

    def said(train: str, test: str) -> str:
        result = evaluate(config, tmp_path / "run", train, test, "retrieval")
        assert (result.train[0], result.test[0]) == tuple(f"{Path(s).parent.name}-000000.tar" for s in (train, test))
        return capfd.readouterr().err

    train, test = (str(world / split / "*.tar") for split in ("train", "test"))
    assert note not in said(train, test)
    assert said(test, train).count(note) == 1
    # Of a cache that is gone nothing can be told.
    value = json.loads((tmp_path / "run" / "run.json").read_text())
    value["teachers"][0]["cache_place"] = str(tmp_path / "gone")
    (tmp_path / "run" / "run.json").write_text(json.dumps(value))
    assert note not in said(test, train)


def test_models_without_a_final_norm(world: Path, config: Config, tmp_path: Path) -> None:
    """Both means raw tokens alone, on one pass of the model either way."""
    test = str(world / "test" / "*.tar")
    vit = make_vit(final_norm=False)
    save_backbone(vit, vit.model.state_dict(), tmp_path / "m")
    result = evaluate(config, tmp_path / "m", None, test, "retrieval")
    assert isinstance(result, Retrieval) and result.normed is None
    with pytest.raises(UserError, match=r"evaluate\.tokens norm is for ViTs with a final norm; use block"):
        evaluate(world_config(world, "evaluate.tokens=norm"), tmp_path / "m", None, test, "retrieval")
    pooled_first = make_vit(global_pool="avg")  # its norm is called fc_norm
    save_backbone(pooled_first, pooled_first.model.state_dict(), tmp_path / "avg")
    result = evaluate(config, tmp_path / "avg", None, test, "retrieval")
    assert isinstance(result, Retrieval) and result.normed is not None


def test_tasks_of_one_command_share_features(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each set of shards goes through the model once, and every task finds what it finds alone."""
    config, shards = world_config(world, QUICK), [str(world / split / "*.tar") for split in ("train", "test")]
    tasks = ("classification", "retrieval", "domain-shift")
    alone = {task: asdict(evaluate(config, world / "teacher", *shards, task)) for task in tasks}
    passes = []
    monkeypatch.setattr(
        "pipeline.evaluation.global_features.compute_tokens",
        lambda vit, images, *rest: passes.append(images) or compute_tokens(vit, images, *rest),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    named = [word for task in tasks for word in ("--task", task)]
    command = ["evaluate", world / "teacher", "--train", shards[0], "--test", shards[1], "--out", tmp_path / "out"]
    monkeypatch.setattr(
        "sys.argv", ["singer", *map(str, command), *named, f"--config={tmp_path}/config.yaml", "--json"]
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    together = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [len(images) for images in passes] == [100, 40]
    assert len(list((tmp_path / "out").iterdir())) == 3
    # Another model beside it has files of its own.
    again = shutil.copytree(world / "teacher", tmp_path / "again")
    evaluate(config, again, None, shards[1], "retrieval", tmp_path / "out")
    found = [json.loads(file.read_text()) for file in (tmp_path / "out").iterdir()]
    assert sorted(f["model"] for f in found) == sorted([str(again), *[str(world / "teacher")] * 3])
    for task in tasks:
        for figures in (alone[task], together[task]):
            assert figures.pop("seconds") > 0
            figures.pop("written"), figures.pop("model")
        assert together[task] == alone[task]


def test_features_do_not_depend_on_batches(world: Path) -> None:
    vit = make_vit()
    images = index_images(str(world / "test" / "*.tar"))
    wide, narrow = (load_config(sets=[f"evaluate.batch_size={n}"]).evaluate for n in (64, 7))
    a, b = features(vit, images, wide, CPU), features(vit, images, narrow, CPU)
    assert list(a) == ["block", "norm"]
    for kind, named in a.items():
        for name, x in named.items():
            torch.testing.assert_close(x, b[kind][name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a["norm"]["cls"], vit.model.norm(a["block"]["cls"]))


def test_model_folder_without_cls(world: Path, config: Config, tmp_path: Path) -> None:
    vit = make_vit("vit_base_patch16_siglip_224", num_classes=0)
    save_backbone(vit, vit.model.state_dict(), tmp_path / "m")
    result = evaluate(config, tmp_path / "m", str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    assert set(result.linear) == {"mean_patch"} and result.written is None
    assert [f.name for f in sorted((tmp_path / "m").iterdir())] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_model_by_name(name: str, world: Path, tmp_path: Path) -> None:
    """With a local weight file, as the same model from a folder; at its own size or another."""
    model = timm.create_model(name, num_classes=4).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert load_model(name, tmp_path / "w.safetensors").image_size == 160
    sized, test = world_config(world, "evaluate.image_size=64"), str(world / "test" / "*.tar")
    found = evaluate(sized, name, None, test, "retrieval", tmp_path / "out", tmp_path / "w.safetensors")
    assert isinstance(found, Retrieval) and found.written is not None
    stored = json.loads(found.written.read_text())
    assert found.written.parent == tmp_path / "out" and stored["retrieval"] == found.retrieval
    vit = load_model(name, tmp_path / "w.safetensors")
    save_backbone(vit, vit.model.state_dict(), tmp_path / "m")
    for same in (tmp_path / "m", f"local-dir:{tmp_path / 'm'}"):
        folder = evaluate(sized, same, None, test, "retrieval")
        assert isinstance(folder, Retrieval) and folder.retrieval == found.retrieval and folder.written is None


def test_labels_of_test_must_be_known(world: Path, config: Config, tmp_path: Path) -> None:
    draw_images(tmp_path / "in", 2, 5)
    prepare(config, tmp_path / "in", tmp_path / "two")
    shutil.copytree(world / "test", tmp_path / "test")
    shards = str(tmp_path / "two" / "*.tar"), str(tmp_path / "test" / "*.tar")
    with pytest.raises(UserError, match="--test has class 'class3', of which --train has no image"):
        evaluate(config, world / "teacher", *shards)
    for folder in (tmp_path / "two", tmp_path / "test"):
        (folder / "classes.json").unlink()
    with pytest.raises(UserError, match="--test has label 3, but --train has only 0 to 1"):
        evaluate(config, world / "teacher", *shards)


def test_linear_probe_is_logistic_regression() -> None:
    """scikit-learn's as anyone would use it, on features that are neither easy nor hopeless.

    At one strength the same answers, but for what is on a border; a strength chosen from few images costs little.
    """
    x, y = make_classification(3000, 20, n_informative=10, n_classes=5, random_state=seeded(1))
    train, test = slice(0, 1000), slice(1000, None)
    x = (x - x[train].mean(0)) / x[train].std(0)
    plain = LogisticRegression(max_iter=5000).fit(x[train], y[train])
    features_, labels = torch.from_numpy(x.astype("f4")), torch.from_numpy(y)

    def scores(*sets: str) -> torch.Tensor:
        settings = load_config(sets=list(sets)).evaluate
        return torch.cat(list(linear_scores(features_[train], labels[train], features_[test], 5, settings)))

    expected = 100 * plain.score(x[test], y[test])
    assert 40 < expected < 95
    same = scores("evaluate.strengths=[1.0]").argmax(1).numpy() == plain.predict(x[test])
    assert same.mean() > 0.995
    assert accuracy([scores()], labels[test])["top1"] == pytest.approx(expected, abs=3)


def test_intervals_and_shots(world: Path) -> None:
    """12, 3, 12 and 12 training images a class: class 1 alone is few-shot; figures of groups make up that of all."""
    train, test = index_images(str(world / "train" / "*.tar")), index_images(str(world / "test" / "*.tar"))
    kept = np.concatenate([np.flatnonzero(train.labels == c)[: 3 if c == 1 else 12] for c in range(4)])

    def run(*sets: str) -> Classification:
        settings = load_config(sets=["evaluate.workers=1", QUICK, *sets]).evaluate
        vit = load_saved(world / "teacher")
        return probe_classification(
            EvaluationContext(world / "teacher", vit, CPU, train.select(kept), test, settings, 0.0, None)
        )

    found = run("evaluate.shots=[4,11]")
    for figures in (*found.linear.values(), *found.knn.values()):
        assert set(figures) == {"top1", "top5", "top1_low", "top1_high", "top1_many", "top1_few"}
        assert figures["top1"] == pytest.approx((30 * figures["top1_many"] + 10 * figures["top1_few"]) / 40, abs=1e-3)
        interval = wilson_percent(round(figures["top1"] * 0.4), 40)
        assert (figures["top1_low"], figures["top1_high"]) == interval
    for other in ("evaluate.shots=[20,100]", "evaluate.shots=null"):
        assert set(run(other).linear["cls"]) == {"top1", "top5", "top1_low", "top1_high"}, other
    with pytest.raises(UserError, match="shots: 9 is larger than 3"):
        load_config(sets=["evaluate.shots=[9,3]"])


def test_retrieval_needs_no_training_images(world: Path, config: Config, tmp_path: Path) -> None:
    distill(config, world / "cache", tmp_path / "run", world / "adapters")
    test = str(world / "test" / "*.tar")
    result = evaluate(config, tmp_path / "run", None, test, "retrieval")
    assert isinstance(result, Retrieval) and (result.queries, result.train_images, result.test_images) == (40, 0, 40)
    assert set(result.retrieval) == {"cls", "mean_patch"}
    found = features(load_saved(tmp_path / "run" / "student"), index_images(test), config.evaluate, CPU)["block"]
    labels = torch.from_numpy(index_images(test).labels)
    assert result.retrieval["mean_patch"] == retrieval_figures(found["mean_patch"], labels)
    assert result.normed is not None and set(result.normed["retrieval"]) == {"cls", "mean_patch"}
    assert result.written is not None
    stored = json.loads(result.written.read_text())
    assert stored["train"] == [] and stored["retrieval"] == result.retrieval
    with pytest.raises(UserError, match="this task learns from images; give --train"):
        evaluate(config, world / "teacher", None, test)


def renumbered(world: Path, folder: Path, config: Config) -> str:
    """The test images of class 2 and 0, now numbered 0 and 1."""
    for new, old in (("a", "class2"), ("b", "class0")):
        shutil.copytree(world / "images" / "test" / old, folder / "in" / new)
    prepare(config, folder / "in", folder / "out")
    (folder / "out" / "classes.json").unlink()
    return str(folder / "out" / "*.tar")


def test_domain_shift(world: Path, config: Config, tmp_path: Path) -> None:
    """With the map as object or list; a wrong map is wrong, and more rivals make it harder."""
    train, test = str(world / "train" / "*.tar"), renumbered(world, tmp_path, config)
    results = {}
    for name, tree in {"object": {"0": 2, "1": 0}, "list": [2, 0], "swapped": [0, 2], "more": [2, 0, 1, 3]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
        settings = world_config(world, QUICK, f"evaluate.class_map={tmp_path / name}.json")
        result = evaluate(settings, world / "teacher", train, test, "domain-shift")
        assert isinstance(result, DomainShift) and result.test_images == 20
        results[name] = result
    assert results["object"].linear == results["list"].linear and results["object"].classes == 2
    good, bad, more = (results[name].linear["mean_patch"] for name in ("object", "swapped", "more"))
    assert good["top1"] >= 80 and good["top5"] == 100 and good["top1_low"] < good["top1"] < good["top1_high"] + 1e-6
    assert bad["top1"] == pytest.approx(100 - good["top1"], abs=1e-3)
    assert results["more"].classes == 4 and more["top1"] <= good["top1"]
    quick, test = world_config(world, QUICK), str(world / "test" / "*.tar")
    same = evaluate(quick, world / "teacher", train, test, "domain-shift")
    assert isinstance(same, DomainShift) and same.classes == 4
    plain = evaluate(quick, world / "teacher", train, test)
    assert same.linear == plain.linear and same.normed is not None and plain.normed is not None
    assert same.normed["linear"] == plain.normed["linear"]


BAD_MAPS = {
    "{": r"class_map: .*map\.json must be JSON such as",
    "3": r"map\.json must be JSON such as",
    "{}": r"map\.json must be JSON such as",
    '["1"]': r"map\.json must be JSON such as .*; found 0: '1'",
    '{"a": 1}': r"map\.json must be JSON such as .*; found 'a': 1",
    "[true, 1]": r"map\.json must be JSON such as .*; found 0: True",
    "[2]": r"map\.json has no entry for label 1 of --test; add it",
    "[2, 9]": r"map\.json names label 9, of which --train has no images",
}


@pytest.mark.parametrize("text", BAD_MAPS)
def test_bad_class_maps_are_named(text: str, world: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    settings = world_config(world, f"evaluate.class_map={tmp_path / 'map.json'}")
    train, test = str(world / "train" / "*.tar"), renumbered(world, tmp_path, config)
    with pytest.raises(UserError, match=BAD_MAPS[text]):
        evaluate(settings, world / "teacher", train, test, "domain-shift")


def test_domain_shift_without_a_map(world: Path, config: Config, tmp_path: Path) -> None:
    gone = world_config(world, f"evaluate.class_map={tmp_path / 'gone.json'}")
    train, test = str(world / "train" / "*.tar"), str(world / "test" / "*.tar")
    with pytest.raises(UserError, match=r"evaluate\.class_map: .*gone\.json: No such file"):
        evaluate(gone, world / "teacher", train, test, "domain-shift")
    few = renumbered(world, tmp_path, config)
    with pytest.raises(UserError, match="--test has label 2, of which --train has no images; if it numbers classes"):
        evaluate(config, world / "teacher", few, test, "domain-shift")


def test_own_head(world: Path, tmp_path: Path) -> None:
    """Figures of the model's own logits, with the map or without; nothing is learnt."""
    shutil.copytree(world / "test", tmp_path / "shards")  # of 4 classes; the teacher's head has 5
    (tmp_path / "shards" / "classes.json").unlink()
    test = str(tmp_path / "shards" / "*.tar")
    found = evaluate(world_config(world), world / "teacher", None, test, "head", tmp_path / "out")
    assert isinstance(found, OwnHead) and (found.classes, found.train_images, found.test_images) == (5, 0, 40)
    teacher, images = load_saved(world / "teacher"), index_images(test)
    with ImageFile(images) as files, torch.inference_mode():
        views = [apply_view(image, crop_view(1.0, image.size), 32) for image in map(files.read, range(40))]
        logits = teacher.model(normalise(torch.from_numpy(np.stack(views)), teacher.mean, teacher.std))
    labels = torch.from_numpy(images.labels)
    assert found.top1 == accuracy([logits], labels)["top1"] and found.top5 == 100
    assert (found.top1_low, found.top1_high) == wilson_percent(round(found.top1 * 0.4), 40)
    assert found.written is not None
    stored = json.loads(found.written.read_text())
    assert (stored["task"], stored["top1"], stored["classes"]) == ("head", found.top1, 5)

    (tmp_path / "map.json").write_text("[4, 2, 4, 0]")
    mapped = world_config(world, f"evaluate.class_map={tmp_path / 'map.json'}")
    found = evaluate(mapped, world / "teacher", None, str(world / "test" / "*.tar"), "head")
    assert isinstance(found, OwnHead) and found.classes == 3
    right = torch.tensor([[2, 1, 2, 0][label] for label in labels])  # of 0, 2 and 4
    assert found.top1 == accuracy([logits[:, [0, 2, 4]]], right)["top1"]


def test_a_head_that_names_its_classes(world: Path, config: Config, tmp_path: Path) -> None:
    """Its order may be another one than that of the test images."""
    vit, test = make_vit(num_classes=4), str(world / "test" / "*.tar")
    for name in ("plain", "turned"):
        if name == "turned":
            for tensor in (vit.model.head.weight, vit.model.head.bias):
                tensor.data.copy_(tensor.data.flip(0))
            vit.model.pretrained_cfg["label_names"] = [f"class{n}" for n in (3, 2, 1, 0)]
        save_backbone(vit, vit.model.state_dict(), tmp_path / name)
    plain, turned = (evaluate(config, tmp_path / name, None, test, "head") for name in ("plain", "turned"))
    assert isinstance(plain, OwnHead) and isinstance(turned, OwnHead) and plain.top1 == turned.top1
    vit.model.pretrained_cfg["label_names"] = ["class0", "class1", "class2", "other"]
    save_backbone(vit, vit.model.state_dict(), tmp_path / "other")
    with pytest.raises(
        UserError, match="--test has class 'class3', which the head of .*other does not know; leave it out"
    ):
        evaluate(config, tmp_path / "other", None, test, "head")
    shutil.copytree(world / "images" / "test" / "class0", tmp_path / "images" / "zebra")
    with pytest.raises(UserError, match="--test has class 'zebra', which the head of .*other does not know"):
        evaluate(config, tmp_path / "other", None, tmp_path / "images", "head")
    with pytest.raises(UserError, match="--test has 1 class, but the head of .*plain has 4 classes; if"):
        evaluate(config, tmp_path / "plain", None, tmp_path / "images", "head")


def test_a_head_that_does_not_fit(world: Path, config: Config, tmp_path: Path) -> None:
    test = str(world / "test" / "*.tar")
    with pytest.raises(UserError, match=r"--test has 4 classes, but the head of .*teacher has 5 classes; if"):
        evaluate(config, world / "teacher", None, test, "head")
    (tmp_path / "map.json").write_text("[0, 1, 2, 5]")
    mapped = world_config(world, f"evaluate.class_map={tmp_path / 'map.json'}")
    with pytest.raises(UserError, match=r"map\.json names class 5, but the head has 0 to 4"):
        evaluate(mapped, world / "teacher", None, test, "head")
    shutil.copytree(world / "test", tmp_path / "shards")
    (tmp_path / "shards" / "classes.json").unlink()
    for classes, message in (
        (3, "--test has label 3, but the head of .* has 3 classes"),
        (0, "has no classification head"),
    ):
        vit = make_vit(num_classes=classes)
        save_backbone(vit, vit.model.state_dict(), tmp_path / f"m{classes}")
        with pytest.raises(UserError, match=message):
            evaluate(config, tmp_path / f"m{classes}", None, str(tmp_path / "shards" / "*.tar"), "head")


def test_the_advice_for_a_broken_image_works(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        draw_images(tmp_path / split, 4, 2)
        (tmp_path / split / "class1" / "broken.jpg").write_bytes(b"broken")
    words = ["evaluate", world / "teacher", "--train", tmp_path / "train", "--test", tmp_path / "test", "--set", QUICK]
    assert run_singer(monkeypatch, *words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "broken.jpg" in line
    assert run_singer(monkeypatch, *words, *line.rpartition(" with ")[2].split(), "--json") == 0
    told = capfd.readouterr()
    assert told.err.count("skipped: image") == 2 and json.loads(told.out.splitlines()[-1])["test_images"] == 8


# Whether a student learned from the test images


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    distill(world_config(world, "distill.epochs=1"), world / "cache", run)
    return run


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache_place": "GONE"}, "its cache cannot be read: "),
        ({"cache_place": "s3://bucket/cache"}, "its cache s3://bucket/cache is not on this machine"),
        ({"cache": "0" * 64}, "there is another cache at "),
        ({}, None),
    ],
    ids=["moved", "remote", "another", "there"],
)
def test_whether_a_student_knows_the_test_images(
    world: Path,
    trained: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: dict[str, str],
    reason: str | None,
) -> None:
    """Yes, no or unknown, in a line and in the result; unknown says why."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "student").symlink_to(trained / "student")
    change = {k: str(tmp_path / "gone") if v == "GONE" else v for k, v in change.items()}
    value = json.loads((trained / "run.json").read_text())
    value["teachers"][0] |= change
    (run / "run.json").write_text(json.dumps(value))
    answers = {}
    for split in ("train", "test"):
        result = evaluate(world_config(world), run, None, str(world / split / "*.tar"), "retrieval")
        assert result.written is not None
        answers[split] = json.loads(result.written.read_text())["learned_from_test"]
        assert answers[split] == result.learned_from_test
    said = capfd.readouterr().err
    unknown = "note: it is unknown whether the student learned from images of --test: "
    if reason is None:
        assert answers == {"train": "yes", "test": "no"} and unknown not in said
        assert said.count("note: the student learned from images of --test") == 1
    else:
        assert answers == {"train": "unknown", "test": "unknown"}
        assert said.count(unknown + reason) == 2


def test_of_a_model_that_is_no_run_nothing_is_asked(world: Path, trained: Path, tmp_path: Path) -> None:
    result = evaluate(
        world_config(world), trained / "student", None, str(world / "test" / "*.tar"), "retrieval", tmp_path
    )
    assert result.learned_from_test is None
