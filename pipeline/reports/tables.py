"""The tables of the page: the leaderboard's rows, the cards at the top, refiners, recipes."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.cache.manifest import TeacherManifest
from pipeline.evaluation.figures import Mean
from pipeline.models.names import OWN
from pipeline.reports import charts
from pipeline.reports.measure_page import PageMeasurements
from pipeline.reports.measurements import sources_of
from pipeline.reports.scores import Column, Score
from pipeline.reports.seeds import SeedGroup
from pipeline.runtime.progress import duration
from pipeline.storage.json_files import read_json
from pipeline.training.refining.stored_refiners import METRICS
from pipeline.training.run_directory import LOG
from singer.backbones import count_parameters
from singer.suffix import outline

_STYLES = ("solid", "dashed", "dotted")


@dataclass(frozen=True)
class ReportRow:
    """A row of the leaderboard; norm: mean_max_over_median of its students, as in ReportResult."""

    rank: int | None
    group: SeedGroup
    colour: str
    scores: dict[Column, Score]
    norm: Mean

    @property
    def tuned(self) -> bool:
        """Return whether its students were fine-tuned."""
        return self.group.runs[0].result.finetuned is not None

    def mean(self, name: str) -> Mean:
        """Return the mean over the seeds of a figure of the runs' last training; of seconds, of all their training."""
        figures = []
        for result in (run.result for run in self.group.runs):
            last = result if result.finetuned is None else result.finetuned
            before = result.seconds if name == "seconds" and last is not result else 0.0
            figures.append(float(getattr(last, name)) + before)
        return Mean.of(figures)


@dataclass(frozen=True)
class SummaryCard:
    """A card at the top of the page; text: explains the value."""

    title: str
    value: str
    text: str


@dataclass(frozen=True)
class Refined:
    """A refiner's own figures on its held-out records.

    runs: the students that learned from it; blocks: {block: figures, as in its metrics.json}; records: the number of
    held-out records, or None if it is not stored.
    """

    title: str
    runs: list[str]
    hash: str
    seconds: float | None
    blocks: dict[int, Any]
    records: int | None


def cards(
    rows: Sequence[ReportRow], by: Column | None, measured: PageMeasurements, teacher: TeacherManifest
) -> list[SummaryCard]:
    """Return the cards: best student, artifacts before and after refining, the student's outliers, size, cost."""
    first = rows[0]
    name, run = first.group.name, first.group.runs[0].result
    found = []
    if by is not None and by in first.scores:
        others = [row for row in rows[1:] if by in row.scores]
        second = f"; then {others[0].group.name}, {others[0].scores[by].mean.text(by.form)}" if others else ""
        found.append(
            SummaryCard(
                "best student", f"{first.scores[by].mean.text(by.form)} %", f"{name}: {', '.join(by.label)}{second}"
            )
        )
    teachers, *others_seen = measured.measurements
    refined = next((measurement for measurement in others_seen if measurement.kind == "refined"), None)
    before = f"{teachers.above(measured.threshold):.2f}"
    if refined is not None:
        after = f"{refined.above(measured.threshold):.2f}"
        text = "of the teacher's patch tokens, before and after refining"
        several = sum(measurement.kind == "refined" for measurement in others_seen) > 1
        text += f" ({refined.title.removeprefix('refined: ')})" if several else ""
        found.append(SummaryCard("artifacts", f"{before} → {after} %", text))
    else:
        found.append(SummaryCard("artifacts", f"{before} %", "of the teacher's patch tokens; they were not refined"))
    text = f"mean over images of largest / median norm: {name}; the teacher has {teachers.mean_max_over_median:.1f}"
    found.append(SummaryCard("student's outliers", f"{first.norm.mean:.1f}", text))
    count = parameters(teacher)
    text = "parameters"
    if count is not None:
        text += f"; the teacher has {count / 1e6:.1f} M, {count / run.parameters:.1f} times as many"
    found.append(SummaryCard("size", f"{run.parameters / 1e6:.2f} M", text))
    wait = first.mean("data_wait_percent").mean
    speed = f"of training at {first.mean('images_per_second').mean:.0f} images/s, {wait:.0f} % of it waiting for data"
    found.append(SummaryCard("cost", duration(first.mean("seconds").mean), speed))
    return found


def parameters(teacher: TeacherManifest) -> int | None:
    """Return the number of the teacher's parameters, with its head; None for a module of the user's own."""
    if teacher.architecture.startswith(OWN):
        return None
    return count_parameters(outline(teacher.architecture, teacher.model_args))


def refiners(groups: Sequence[SeedGroup]) -> list[Refined]:
    """Return the refiners of the first run of every group, each once; joint adapters have no figures."""
    found = []
    firsts = [group.runs[0] for group in groups]
    for source in sources_of(firsts):
        metrics = {} if source.joint else read_json(source.folder, METRICS, "finished refiner")
        names = [g.name for g in groups if (s := g.runs[0].source) and (s.hash, s.title) == (source.hash, source.title)]
        blocks = {int(block): figures for block, figures in metrics.get("blocks", {}).items()}
        seconds, records = metrics.get("seconds"), metrics.get("held_out_records")
        found.append(Refined(source.title, names, source.hash, seconds, blocks, records))
    return found


def fit_curves(groups: Sequence[SeedGroup]) -> list[charts.Curve]:
    """Return the losses of the adapters, fitted alone or in joint training, of the first run of every group."""
    curves = []
    for number, group in enumerate(groups):
        source = group.runs[0].source
        if source is None:
            continue
        # The last block comes first, so that it has the solid line.
        logs = charts.read_fit(source.folder, LOG if source.joint else "log-*.jsonl")
        for stem, style in zip(sorted(logs, key=_block, reverse=True), itertools.cycle(_STYLES), strict=False):
            what = "joint" if source.joint else stem.replace("log-", "block ")
            curves.append(charts.Curve(f"{group.name}, {what}", charts.colour(number), style, logs[stem]))
    return curves


def _block(stem: str) -> int:
    """Return the block of a log file's stem: 11 for log-11; blocks that were fitted together have the first number."""
    numbers = re.findall(r"\d+", stem)
    return int(numbers[0]) if numbers else 0


def recipe(group: SeedGroup) -> str:
    """Return the sections that made the students, as YAML; if there are several runs, those of the first."""
    run = group.runs[0]
    tree = run.config.model_dump(mode="json")
    return yaml.safe_dump({section: tree[section] for section in run.sections}, sort_keys=False)


def flat(row: ReportRow, columns: Sequence[Column]) -> dict[str, Any]:
    """Return a row as plain values, for the command line."""
    means = {c.key: row.scores[c].mean.mean if c in row.scores else None for c in columns}
    ranked: dict[str, Any] = {"rank": row.rank} if columns else {}
    return {
        **ranked, "run": row.group.name, "seeds": len(row.group.runs), **means, "mean max / median norm": row.norm.mean,
        "parameters": row.group.runs[0].result.parameters, "seconds": row.mean("seconds").mean,
    }  # fmt: skip
