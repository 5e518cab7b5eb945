"""What the evaluate-*.json of runs hold: figures that may be compared, and their means over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, keys
from pipeline.evaluation.context import without_top5
from pipeline.evaluation.figures import DEFAULT_FIGURE, FIGURES, Mean, in_percent, with_bounds, words_of
from pipeline.reports.seeds import SeedGroup
from pipeline.storage.outputs import read_json, validated
from singer.errors import UserError

RESULTS = "evaluate-*.json"
# Errors, in meters: better where they are smaller.
_ERRORS = {"depth": ("bins.rmse", "regression.rmse")}
# Settings of a probe in words, where their keys alone say little or their values are Python's.
_TOKENS = {"block": "raw tokens", "norm": "tokens behind the final norm"}


@dataclass(frozen=True)
class Probe:
    """A task on certain images with certain settings, seeds apart: only figures of one probe may be compared."""

    task: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_images: int
    test_images: int
    settings: tuple[tuple[str, Any], ...]

    @property
    def words(self) -> str:
        """The settings, as the page tells them; what is not set goes without saying."""
        told = {"tokens": _TOKENS.get(dict(self.settings)["tokens"], "")}
        for key, value in self.settings:
            if key == "image_size":
                told[key] = "at the model's own resolution" if value is None else f"at {value} px"
            elif key not in told and value is not None:
                values = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
                told[key] = f"{key.replace('_', ' ')} {values}"
        return "; ".join(told.values())


@dataclass(frozen=True)
class Column:
    """A figure of a probe. label: words for it, the task first; form: how a value is written; error: less is better."""

    probe: Probe
    figure: str
    label: tuple[str, ...]
    form: str
    error: bool

    @property
    def name(self) -> str:
        """The figure's; those of several probes of a task have the same."""
        return f"{self.probe.task}.{self.figure}"

    @property
    def key(self) -> str:
        """A name that no other column has."""
        return f"{self.label[0]}.{self.figure}"


@dataclass(frozen=True)
class Score:
    """Over `count` runs of a group."""

    mean: Mean
    count: int


# {probe: {figure: value}}; the bounds of figures are there too.
Figures = dict[Probe, dict[str, float]]


def read_figures(folder: Path) -> Figures:
    """Of all evaluate-*.json in a folder. Raises UserError naming a damaged file, or models if there are several."""
    found: Figures = {}
    models: dict[Probe, object] = {}
    for file in sorted(folder.glob(RESULTS)):
        value = read_json(folder, file.name, "result of evaluate")
        task = str(value.get("task", "classification"))
        if task not in FIGURES:
            continue
        try:
            known = {k: v for k, v in value["config"].items() if k in EvaluateConfig.model_fields}
            settings = validated(known, EvaluateConfig, str(file)).model_dump(mode="json")
            if settings["tokens"] == "both":  # those of raw tokens are where they are in a result of these alone
                settings["tokens"] = "block"
            probe = Probe(
                task,
                tuple(value["train"]),
                tuple(value["test"]),
                int(value["train_images"]),
                int(value["test_images"]),
                tuple((key, _hashable(settings[key])) for key in _keys_of(task)),
            )
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file} is damaged: it does not say what was probed; repeat singer evaluate") from None
        if models.setdefault(probe, value.get("model")) != value.get("model"):
            both = f"{models[probe] or 'a model without name'} and {value.get('model') or 'a model without name'}"
            raise UserError(f"{folder} has figures of {both}; keep those of one model apart (evaluate --out)")
        value, names = without_top5(value), (*FIGURES[task], *_ERRORS.get(task, ()))
        figures = {name: _pick(value, name) for figure in names for name in with_bounds(figure)}
        found[probe] = {name: figure for name, figure in figures.items() if figure is not None}
    return found


def _keys_of(task: str) -> list[str]:
    """List the keys of the section evaluate that figures of a task depend on, seeds apart."""
    found = ((name, about) for name, about in keys(EvaluateConfig) if about.affects == "result" and name != "seed")
    return [name for name, about in found if not about.only or task in about.only]


def columns_of(everything: Iterable[Figures]) -> list[Column]:
    """Every figure that some model has, task by task."""
    held: dict[Probe, set[str]] = {}
    for figures in everything:
        for probe, values in figures.items():
            held.setdefault(probe, set()).update(values)
    probes = sorted(held, key=lambda p: [*FIGURES].index(p.task))
    labels = _labels(probes)
    columns = []
    for probe in probes:
        errors = _ERRORS.get(probe.task, ())
        for figure in (*FIGURES[probe.task], *errors):
            if figure in held[probe]:
                form = "%.3f" if figure in errors else "%.1f"
                columns.append(Column(probe, figure, (labels[probe], *words_of(figure)), form, figure in errors))
    return columns


def ranking_column(columns: Sequence[Column], everything: Sequence[Figures], asked: str | None) -> Column | None:
    """What runs are ranked by: the figure asked for, the usual one, or any; of the probe that most runs have."""
    able = [column for column in columns if not column.error]
    for name in (asked, DEFAULT_FIGURE):
        able = [column for column in able if column.name == name] or able
    return max(able, key=lambda c: sum(c.figure in f.get(c.probe, {}) for f in everything), default=None)


def score(
    groups: Mapping[SeedGroup, Sequence[Figures]], columns: Sequence[Column]
) -> dict[SeedGroup, dict[Column, Score]]:
    """Means over the runs of a group that have a figure."""
    table: dict[SeedGroup, dict[Column, Score]] = {}
    for group, members in groups.items():
        table[group] = {}
        for column in columns:
            held = [f[column.probe] for f in members if column.figure in f.get(column.probe, {})]
            if held:
                table[group][column] = Score(Mean.of_figure(held, column.figure), len(held))
    return table


def rank(table: Mapping[SeedGroup, Mapping[Column, Score]], by: Column | None) -> list[tuple[int | None, SeedGroup]]:
    """Best first, equals alike; groups without the figure come behind, in their order."""
    if by is None:
        return [(None, group) for group in table]
    ranked = sorted((g for g in table if by in table[g]), key=lambda g: -table[g][by].mean.mean)
    values = [table[g][by].mean.mean for g in ranked]
    places: list[tuple[int | None, SeedGroup]] = [(1 + values.index(v), g) for v, g in zip(values, ranked, strict=True)]
    return places + [(None, group) for group in table if by not in table[group]]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pick(value: Any, figure: str) -> float | None:
    for key in figure.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        return None
    return in_percent(figure, value)


def _labels(probes: Sequence[Probe]) -> dict[Probe, str]:
    """The task; where it is there several times, with the first test shard or a number."""
    labels: dict[Probe, str] = {}
    for probe in probes:
        same = [p for p in probes if p.task == probe.task]
        label = probe.task
        if len(same) > 1:
            tests = {p.test for p in same}
            label += (
                f" {probe.test[0].removesuffix('.tar')}" if len(tests) == len(same) else f" {same.index(probe) + 1}"
            )
        labels[probe] = label
    return labels
