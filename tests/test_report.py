"""`singer report`: the page says what was stored and measured, and needs no other file; mistakes are named."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded, world_config
from sklearn.decomposition import PCA

from pipeline.cache import Cache
from pipeline.data import ImageFile
from pipeline.data.views import normalise
from pipeline.models.loading import load_saved
from pipeline.reports.charts import box_of
from pipeline.reports.measurements import choose_shown
from pipeline.reports.runs import find_cache, read_runs
from pipeline.reports.scores import columns_of, ranking_column, read_figures
from pipeline.reports.seeds import differences, group_runs
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.report import ReportResult, report
from pipeline.training.refining.stored_refiners import load_refiner
from pipeline.training.run_directory import find_runs
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.maps import cosine_to, principal_scores, turn_towards

VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip_seed-0 and -1 on refined features, raw, all probed; conv: another grid, not probed. Tests only read it."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        config = world_config(world, f"distill.seed={seed}", "distill.epochs=1")
        distill(config, world / "cache", root / f"clip_seed-{seed}", world / "adapters")
    config = world_config(world, "evaluate.strengths=[0.1]")
    distill(config, world / "cache", root / "raw")
    evaluate(config, root / "raw", str(world / "train" / "*.tar"), str(world / "test" / "*.tar"))
    (file,) = (root / "raw").glob("evaluate-*.json")
    # Figures that are easy to tell apart.
    value = json.loads(file.read_text())
    for name, base in (("raw", 20.0), ("clip_seed-0", 40.0), ("clip_seed-1", 43.0)):
        for n, probe in enumerate(("linear", "knn")):
            for m, tokens in enumerate(("cls", "mean_patch")):
                value[probe][tokens]["top1"] = base * (1 + 0.11 * n + 0.047 * m)
        (root / name / file.name).write_text(json.dumps(value))
    conv = ("student.name=test_convnext", *(f"student.{k}=null" for k in ("dim", "depth", "heads", "patch_size")))
    distill(world_config(world, *conv, "student.image_size=64", "distill.epochs=1"), world / "cache", root / "conv")
    return root


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportResult, str]:
    """A page about all of them, and its text."""
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    result = report([runs / name for name in ("raw", "clip_seed-0", "clip_seed-1", "conv")], out, records=40)
    return result, out.read_text()


class Page(HTMLParser):
    """Tables as lists of rows of texts, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, *cells: str) -> list[str]:
        """The first row that has these cells."""
        return next(row for row in self.rows if set(cells) <= {cell.strip() for cell in row})


def stored(run: Path) -> dict[str, Any]:
    (file,) = run.glob("evaluate-*.json")
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def test_figures_are_the_stored_ones(runs: Path, written: tuple[ReportResult, str]) -> None:
    result, text = written
    page = Page(text)
    assert page.open == []
    pair = [stored(runs / f"clip_seed-{seed}") for seed in (0, 1)]
    row = page.row("clip", "2")
    for probe in ("linear", "knn"):
        for tokens in ("cls", "mean_patch"):
            values = [value[probe][tokens]["top1"] for value in pair]
            assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in [cell.strip() for cell in row]
    raw = stored(runs / "raw")
    # Of a single run with the stored interval.
    cls = raw["linear"]["cls"]
    assert f"{cls['top1']:.1f}{cls['top1_low']:.1f}–{cls['top1_high']:.1f}" in page.row("raw", "1")
    assert "standard deviation over seeds" in text and "the 95 % interval" in text
    by = {row["run"]: row["classification.linear.mean_patch.top1"] for row in result.leaderboard}
    assert by["conv"] is None and by["raw"] == raw["linear"]["mean_patch"]["top1"]
    assert (result.best, result.runs) == ("clip", 4)
    assert [row["rank"] for row in result.leaderboard] == [1, 2, None]
    assert result.rank_by == "classification.linear.mean_patch.top1"
    ran = json.loads((runs / "raw" / "run.json").read_text())
    assert f"{ran['parameters']:,}" in page.row("raw", f"{ran['images_per_second']:.0f}")


def test_refiner_and_cache_are_told(world: Path, written: tuple[ReportResult, str]) -> None:
    text = written[1]
    metrics = json.loads((world / "adapters" / "metrics.json").read_text())
    page = Page(text)
    for block in ("2", "3"):
        figures = metrics["blocks"][block]
        row = [cell.strip() for cell in page.row("adapter + standardize", block, f"{figures['threshold']:.1f}")]
        for value in (figures["before"], figures["after"]):
            assert f"{value['artifact_percent']:.2f} %" in row and f"{value['max_over_median']:.1f}" in row
        assert f"{figures['clean_drift_percent']:.1f} %" in row
    cache = Cache(world / "cache")
    for what in (cache.id, cache.manifest.data.hash, cache.manifest.teacher.weights, "Losses of the adapters"):
        assert what in text


def test_norms_are_measured_on_the_cached_images(world: Path, runs: Path, written: tuple[ReportResult, str]) -> None:
    """Against features that are computed here, image by image."""
    cache = Cache(world / "cache", blocks=[3])
    records = np.linspace(0, len(cache) - 1, 40).astype(int)
    x = cache.features(records, torch.device("cpu"))[3]
    student = load_saved(runs / "raw" / "student")
    with ImageFile(cache.index.images) as files:
        images = normalise(cache.pixels(records, 32, files), student.mean, student.std)
    expected = {
        "teacher": x[:, 1:],
        "refined teacher": load_refiner(world / "adapters", cache).clean(x, 3)[:, 1:],
        "raw": block_outputs(student.model, images, [2])[2][:, 1:],
    }
    measured = written[0].mean_max_over_median
    for name, patches in expected.items():
        norms = patches.double().norm(dim=-1).numpy()
        median = np.sort(norms.flatten())[(norms.size - 1) // 2]
        assert measured[name] == pytest.approx((norms.max(1) / median).mean(), rel=1e-4), name
    assert measured["teacher"] > 3 > measured["refined teacher"]


def test_page_is_whole(written: tuple[ReportResult, str]) -> None:
    text = written[1]
    assert not re.search(r"https?:|<script|@import|url\((?!#)", text)
    for place in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert place.startswith(("data:", "#")), place
    images = re.findall(r"<img [^>]*>", text)
    # Of teacher, refined teacher and three students: norms, similarities, components; and thrice the images themselves.
    assert len(images) == 6 * (3 * 5 + 3)
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    names = re.findall(r' id="([^"]*)"', text)
    clips = re.findall(r'clip-path="url\(#([^)]*)\)"', text)
    assert clips and set(clips) <= set(names)
    assert "#000000" not in text, "black does not show in dark mode"
    assert text.count("<svg ") == text.count('<svg role="img" aria-label="')


def test_marks_follow_each_grid(written: tuple[ReportResult, str]) -> None:
    """A mark is as wide as a patch of the model: 8 px of 32, and, of the convolutional student's last map, 32 of 64."""
    widths = re.findall(r"width:([\d.]+)%;height:([\d.]+)%", written[1])
    assert sorted({float(w) for w, h in widths if w == h}) == [25.0, 50.0] and len(widths) == 6 * 6


def test_without_probes_and_refiner(runs: Path, tmp_path: Path) -> None:
    result = report([runs / "conv"], tmp_path / "page.html", records=10)
    text = (tmp_path / "page.html").read_text()
    assert result.best is None and result.rank_by is None and "refined teacher" not in result.mean_max_over_median
    assert "<h2>Tasks" not in text and "<h2>Probes" not in text and "What refining did" not in text
    assert "not ranked" in text and "they were not refined" in text and "What differs" not in text


def test_teacher_as_reference(world: Path, runs: Path, tmp_path: Path) -> None:
    config = world_config(world, "evaluate.strengths=[0.1]")
    places = [str(world / split / "*.tar") for split in ("train", "test")]
    probed = evaluate(config, world / "teacher", places[0], places[1], out=tmp_path / "t")
    report([runs / "raw"], tmp_path / "page.html", teacher_probes=tmp_path / "t", records=10)
    page = Page((tmp_path / "page.html").read_text())
    assert f"{probed.linear['cls']['top1']:.1f}" in page.row("teacher")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no figures of singer evaluate"):
        report([runs / "raw"], tmp_path / "b.html", teacher_probes=tmp_path / "empty")


def test_two_evaluations_of_one_run(runs: Path, tmp_path: Path) -> None:
    """With swapped shards, say: another column each, also in the summary; ranked by the probe that most runs share."""
    for name in ("clip_seed-0", "raw"):
        shutil.copytree(runs / name, tmp_path / name)
    value = stored(runs / "raw")
    swapped = {**value, "train": value["test"], "test": value["train"]}
    swapped["linear"] = {kind: {"top1": 1.0} for kind in ("cls", "mean_patch")}
    (tmp_path / "raw" / "evaluate-0.json").write_text(json.dumps(swapped))
    result = report([tmp_path / "raw", tmp_path / "clip_seed-0"], tmp_path / "page.html", records=10)
    usual, other = (f"classification {split}-000000.linear.mean_patch.top1" for split in ("test", "train"))
    assert result.rank_by == usual and result.best == "clip_seed-0"
    expected = {name: stored(runs / name)["linear"]["mean_patch"]["top1"] for name in ("clip_seed-0", "raw")}
    assert {row["run"]: row[usual] for row in result.leaderboard} == expected
    assert {row["run"]: row[other] for row in result.leaderboard} == {"clip_seed-0": None, "raw": 1.0}
    # Nor does a probe that fewer runs have win where no figure is the usual one.
    columns = columns_of([read_figures(tmp_path / "raw")])
    knn = [c for c in columns if c.figure == "knn.cls.top1"]
    everything = [{c.probe: {c.figure: 1.0}} for c in (knn[0], knn[1], knn[1])]
    by = ranking_column(knn, everything, None)
    assert by is knn[1]


def test_test_sets_of_the_same_names_are_kept_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "evaluate-0.json").write_text(json.dumps({**stored(runs / "raw"), "images": "others"}))
    assert len(read_figures(tmp_path / "raw")) == len(read_figures(runs / "raw")) + 1


def test_sweep_folder(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip_seed-0", "raw"):
        shutil.copytree(runs / name, tmp_path / "sweep" / "runs" / name)
    (tmp_path / "sweep" / "runs" / "waiting").mkdir()
    board = {"rank_by": "classification.knn.cls.top1", "rows": [], "failed": {}}
    (tmp_path / "sweep" / "leaderboard.json").write_text(json.dumps(board))
    result = report([tmp_path / "sweep"], tmp_path / "page.html", records=10)
    assert result.runs == 2 and result.rank_by == "classification.knn.cls.top1"
    assert "1 of 3 runs in" in capsys.readouterr().err


def test_joint_adapters_are_shown(world: Path, tmp_path: Path) -> None:
    sets = ("distill.joint=true", "distill.epochs=1", "refine.steps=20")
    distill(world_config(world, *sets), world / "cache", tmp_path / "joint")
    result = report([tmp_path / "joint"], tmp_path / "page.html", records=10)
    text = (tmp_path / "page.html").read_text()
    assert "refined teacher" in result.mean_max_over_median
    assert "joint adapters" in text and "Losses of the adapters" in text


def test_figures_of_held_out_images_are_drawn(world: Path, runs: Path, tmp_path: Path) -> None:
    """Those that the logs have, a chart for each kind; a report of runs without them has none."""
    config = world_config(world, "distill.epochs=2", "distill.holdout=0.2")
    distill(config, world / "cache", tmp_path / "watched", world / "adapters")
    report([tmp_path / "watched", runs / "raw"], tmp_path / "report.html", records=10)
    page = (tmp_path / "report.html").read_text()
    assert "Figures of held-out images over epochs: explained variance, k-NN (%)" in page
    report([runs / "raw"], tmp_path / "without.html", records=10)
    logits = config.changed(distill={"objective": "logits"})
    distill(logits, world / "cache", tmp_path / "logits")  # its targets are not tokens
    report([tmp_path / "logits"], tmp_path / "logits.html", records=10)
    assert "over epochs: k-NN (%)" in (tmp_path / "logits.html").read_text()
    without = (tmp_path / "without.html").read_text()
    assert "held-out images over" not in without and "not trained on" not in without


def test_what_a_fine_tuned_student_cost(runs: Path, tmp_path: Path) -> None:
    """Both trainings count; steps, rate, wait and loss are those of the last."""
    shutil.copytree(runs / "raw", tmp_path / "tuned")
    file = tmp_path / "tuned" / "run.json"
    stored_result = json.loads(file.read_text()) | {"seconds": 60.0}
    tuned = {"classes": 4, "images": 100, "sources": [], "steps": 1234, "loss": 0.321, "seconds": 30.0}
    tuned |= {"images_per_second": 987.0, "data_wait_percent": 6.5}
    file.write_text(json.dumps(stored_result | {"finetuned": tuned}))
    out = tmp_path / "page.html"
    result = report([tmp_path / "tuned"], out, records=4)
    (row,) = result.leaderboard
    assert row["seconds"] == 90.0
    page = Page(out.read_text())
    assert [cell.strip() for cell in page.row("987")][2:] == ["90 s", "1,234", "987", "6.5 %", "0.321"]
    assert "has the time of both trainings" in out.read_text()


def test_sampled_tokens_have_no_maps_of_the_teacher(world: Path, tmp_path: Path) -> None:
    config = world_config(world, "cache.token_share=0.5", "views.pixels=jpeg", "distill.epochs=1")
    cache_teacher(config, str(world / "train" / "*.tar"), tmp_path / "cache")
    distill(config, tmp_path / "cache", tmp_path / "run")
    report([tmp_path / "run"], tmp_path / "page.html", records=10)
    text = (tmp_path / "page.html").read_text()
    assert "the teacher has no maps" in text and text.count("<img ") == 6 * (3 + 3)


def test_what_moved_together_is_found(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    for name in ("cache", "adapters"):
        shutil.copytree(world / name, old / name)
    monkeypatch.chdir(old)
    config = world_config(world, "distill.epochs=1")
    distill(config, Path("cache"), Path("runs/a"), Path("adapters"))
    monkeypatch.chdir(tmp_path)
    old.rename(tmp_path / "new")
    run, elsewhere, far = Path("new/runs/a"), tmp_path / "elsewhere", tmp_path / "far"

    def find(cache: Path | None = None, *adapters: Path) -> tuple[Path | str, Path]:
        (read,) = read_runs([run], adapters)
        assert read.source is not None
        return find_cache([read], cache).place, read.source.folder.resolve()

    assert find() == (tmp_path / "new" / "cache", tmp_path / "new" / "adapters")
    (tmp_path / "new" / "adapters").rename(elsewhere)
    with pytest.raises(UserError, match="is not at adapters any more; give its place with --refiner"):
        find()
    (tmp_path / "new" / "cache").rename(far)
    with pytest.raises(UserError, match="is not at cache; give its place with --cache"):
        find(None, world / "teacher", elsewhere)
    assert find(far, elsewhere) == (far, elsewhere)


def test_mistakes(world: Path, runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    (tmp_path / "text.html").write_text("<p>mine</p>")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "sweep" / "runs" / "a").mkdir(parents=True)
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (tmp_path / "none", page, {}, "none is not a folder; report takes runs"),
        (world / "cache", page, {}, "cache is not a finished run: it has no run.json"),
        (tmp_path / "sweep", page, {}, "sweep is a sweep without a finished run"),
        (runs / "raw", tmp_path / "page", {}, "give a name that ends in .html"),
        (runs / "raw", tmp_path / "folder.html", {}, "is a folder; give a file"),
        (runs / "raw", tmp_path / "text.html" / "a.html", {}, "text.html is a file; give another folder"),
        (runs / "raw", tmp_path / "text.html", {}, "text.html exists; replace it with --overwrite"),
        (runs / "raw", tmp_path / "text.html", {"overwrite": True}, "was not written by singer report and is left"),
        (runs / "raw", page, {"cache": world / "teacher"}, "teacher is not a feature cache"),
        (runs / "raw", page, {"images": str(world / "test" / "*.tar")}, "--images does not give"),
    ]
    for run, out, options, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            report([run], out, **options)
    assert not page.exists() and (tmp_path / "text.html").read_text() == "<p>mine</p>"


def test_other_caches_and_lost_images(world: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "test", tmp_path / "shards")
    config = world_config(world, "distill.epochs=1")
    cache_teacher(config, str(tmp_path / "shards" / "*.tar"), tmp_path / "cache")
    distill(config, tmp_path / "cache", tmp_path / "run")
    page = tmp_path / "page.html"
    with pytest.raises(UserError, match="a report is about one cache; make one for each"):
        report([runs / "raw", tmp_path / "run"], page)
    with pytest.raises(UserError, match="give its own with --cache"):
        report([tmp_path / "run"], page, cache=world / "cache")
    (tmp_path / "shards").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is gone; if it has moved, give its place with --images"):
        report([tmp_path / "run"], page)
    report([tmp_path / "run"], page, images=str(tmp_path / "moved" / "*.tar"), records=10)
    before = page.read_bytes()
    with pytest.raises(UserError, match="exists; replace it with --overwrite"):
        report([tmp_path / "run"], page)
    again = {"overwrite": True, "images": str(tmp_path / "moved" / "*.tar")}
    report([tmp_path / "run"], page, title="Another", records=10, **again)  # type: ignore[arg-type]
    assert "<title>Another</title>" in page.read_text() and page.read_bytes() != before


def test_damaged_figures(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "raw", tmp_path / "run")
    (file,) = (tmp_path / "run").glob("evaluate-*.json")
    file.write_text("{}")
    with pytest.raises(UserError, match=r"evaluate-\w+.json is damaged: it does not say what was probed"):
        report([tmp_path / "run"], tmp_path / "page.html")


def test_only_figures_of_one_probe_are_compared(tmp_path: Path) -> None:
    """Other images or settings are another column; seeds and speed are not. Shares become percent, errors stay."""
    depth = {"rmse": 0.5, "abs_rel": 0.2, "delta1": 0.875, "lr": 0.1}
    base: dict[str, Any] = {"train": ["a.tar"], "test": ["b.tar"], "train_images": 5, "test_images": 3, "images": "x"}
    values = {
        "evaluate-1.json": {**base, "task": "segmentation", "miou": 40.0, "config": {"seg_classes": 3}},
        "evaluate-2.json": {**base, "task": "segmentation", "miou": 50.0, "config": {"seg_classes": 4}},
        "evaluate-3.json": {**base, "task": "depth", "bins": depth, "config": {"seed": 7, "workers": 9}},
        "evaluate-4.json": {**base, "task": "of tomorrow", "config": {}},
    }
    for name, value in values.items():
        (tmp_path / name).write_text(json.dumps(value))
    figures = read_figures(tmp_path)
    other = {**base, "task": "depth", "bins": {**depth, "delta1": 0.5}, "config": {"seed": 8}}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "evaluate-1.json").write_text(json.dumps(other))
    # Of raw tokens alone and of both kinds: the same column.
    old = {**base, "task": "segmentation", "miou": 30.0, "config": {"seg_classes": 3, "tokens": "block"}}
    (tmp_path / "b" / "evaluate-2.json").write_text(json.dumps(old))
    columns = columns_of([figures, read_figures(tmp_path / "b")])
    (tmp_path / "b" / "evaluate-3.json").write_text(json.dumps({**other, "model": "vit_small"}))
    with pytest.raises(UserError, match=r"b has figures of a model without name and vit_small; keep those of each"):
        read_figures(tmp_path / "b")
    assert [column.label for column in columns] == [
        ("segmentation 1", "mIoU"),
        ("segmentation 2", "mIoU"),
        ("depth", "bins", "delta1"),
        ("depth", "bins", "RMSE (m)"),
    ]
    assert [figures[c.probe][c.figure] for c in columns] == [40.0, 50.0, 87.5, 0.5]
    assert [c.error for c in columns] == [False, False, False, True]


def test_groups_and_differences(runs: Path) -> None:
    names = ("clip_seed-0", "raw", "clip_seed-1", "conv")
    groups = group_runs(read_runs([runs / name for name in names]))
    assert [(g.name, len(g.runs)) for g in groups] == [("clip", 2), ("raw", 1), ("conv", 1)]
    found = differences(groups[:2])
    assert found == {"targets": ["adapter + standardize", "raw"], "distill.epochs": [1, 2]}
    found = differences(groups[1:])
    assert found["student.dim"] == [12, None] and found["distill.epochs"] == [2, 1]


def test_names_are_different(runs: Path, tmp_path: Path) -> None:
    for place in ("a/runs/raw", "b/runs/raw", "b/more/raw"):
        shutil.copytree(runs / "raw", tmp_path / place)
    sweeps = [tmp_path / "a" / "runs" / "raw", tmp_path / "b" / "runs" / "raw"]
    assert [run.name for run in read_runs(sweeps)] == [str(folder) for folder in sweeps]
    beside = [sweeps[1], tmp_path / "b" / "more" / "raw", runs / "conv"]
    assert [run.name for run in read_runs(beside)] == ["runs/raw", "more/raw", f"{runs.name}/conv"]
    # The same folder by two names is one run.
    assert find_runs([sweeps[0], sweeps[0] / ".." / "raw"]) == [sweeps[0] / ".." / "raw"]


def test_choice_of_images_and_boxes() -> None:
    norms = torch.ones(20, 4)
    norms[[3, 5, 8, 13, 14], 1] = 9.0
    assert choose_shown(norms, 5.0, 3).tolist() == [3, 8, 14]
    assert choose_shown(norms, 5.0, 6).tolist() == [0, 3, 7, 11, 15, 19]
    box = box_of(np.arange(101.0), "2")
    assert [box[k] for k in ("whislo", "q1", "med", "q3", "whishi")] == [1, 25, 50, 75, 99] and box["fliers"] == [100]


def test_cosines() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seeded(0)))
    marked = torch.tensor([4, 0, 2])
    found = cosine_to(x, marked)
    for n, m in enumerate(marked.tolist()):
        for p in range(5):
            a, b = x[n, p].double().numpy(), x[n, m].double().numpy()
            assert float(found[n, p]) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_principal_components_are_those_of_scikit_learn() -> None:
    random = torch.Generator().manual_seed(seeded(0))
    x = torch.randn(6, 20, 8, generator=random) @ torch.randn(8, 8, generator=random) + 5
    found = principal_scores(x).flatten(0, 1).numpy()
    flat = x.flatten(0, 1).double().numpy()
    pca = PCA(3).fit(flat)
    expected = (
        pca.transform(flat) / flat.std(0).size ** 0 / np.sqrt(pca.explained_variance_ * (len(flat) - 1) / len(flat))
    )
    signs = np.sign((found * expected).sum(0))
    assert np.abs(found - signs * expected).max() < 1e-4
    loadings = (flat - flat.mean(0)).T @ found
    assert (loadings[np.abs(loadings).argmax(0), range(3)] > 0).all()
    # Fewer channels than colours, and nothing that varies.
    narrow = principal_scores(x[..., :2])
    assert narrow.shape == (6, 20, 3) and float(narrow[..., 2].abs().max()) == 0
    assert float(principal_scores(torch.ones(2, 3, 4)).abs().max()) == 0


def test_components_are_turned_not_bent() -> None:
    random = torch.Generator().manual_seed(seeded(0))
    target = torch.randn(4, 36, 3, generator=random)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=random)).Q
    turned = turn_towards(target @ rotation, (6, 6), target, (6, 6))
    assert torch.allclose(turned, target, atol=1e-5)
    other = torch.randn(4, 16, 3, generator=random)
    moved = turn_towards(other, (4, 4), target, (6, 6))
    assert torch.allclose(torch.cdist(moved, moved), torch.cdist(other, other), atol=1e-4)
