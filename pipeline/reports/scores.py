"""The figures in the evaluate-*.json of runs: which may be compared, and their means over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import EvaluateConfig, keys
from pipeline.evaluation.figures import DEFAULT_FIGURE, FIGURES, Mean, figure_in, with_bounds, words_of
from pipeline.reports.result_text import without_top5
from pipeline.reports.seeds import SeedGroup
from pipeline.storage.json_files import read_json, validated
from singer.errors import UserError
from singer.sizes import Size

RESULTS = "evaluate-*.json"
# Errors in meters, for which smaller is better.
_ERRORS = {"depth": ("bins.rmse", "regression.rmse")}
# The values of evaluate.tokens in words.
_TOKENS = {"block": "raw tokens", "norm": "tokens after the final norm"}


@dataclass(frozen=True)
class Probe:
    """A task on certain images with certain settings, apart from seeds; only figures of one probe may be compared."""

    task: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    train_images: int
    test_images: int
    settings: tuple[tuple[str, Any], ...]
    # A hash of the images: shards may have the same names.
    images: str

    @property
    def words(self) -> str:
        """Return the settings in words, as the page shows them; settings that are none are left out."""
        words = {"tokens": _TOKENS.get(dict(self.settings)["tokens"], "")}
        for key, value in self.settings:
            if key == "image_size":
                words[key] = "at the model's own resolution" if value is None else f"at {Size.of(value)} px"
            elif key == "precision":
                words[key] = f"in {'float32' if value == 'no' else value}"
            elif key not in words and value is not None:
                values = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"
                words[key] = f"{key.replace('_', ' ')} {values}"
        return "; ".join(words.values())


@dataclass(frozen=True)
class Column:
    """A figure of a probe.

    label: words for it, with the task first; form: the printf format of a value; error: whether less is better.
    """

    probe: Probe
    figure: str
    label: tuple[str, ...]
    form: str
    error: bool

    @property
    def name(self) -> str:
        """Return the name of the figure, which several probes of one task share."""
        return f"{self.probe.task}.{self.figure}"

    @property
    def key(self) -> str:
        """Return a name that no other column has."""
        return f"{self.label[0]}.{self.figure}"


@dataclass(frozen=True)
class Score:
    """The mean of a figure over `count` runs of a group."""

    mean: Mean
    count: int


# {probe: {figure: value}}, with the bounds of figures.
Figures = dict[Probe, dict[str, float]]


def read_figures(folder: Path) -> Figures:
    """Read the figures of all evaluate-*.json in a folder.

    Raises UserError if a file is damaged, or if the figures are those of several models.
    """
    found: Figures = {}
    models: dict[Probe, object] = {}
    for file in sorted(folder.glob(RESULTS)):
        value = read_json(folder, file.name, "result of evaluate")
        try:
            task = str(value["task"])
            if task not in FIGURES:
                continue
            known = {k: v for k, v in value["config"].items() if k in EvaluateConfig.model_fields}
            settings = validated(known, EvaluateConfig, str(file)).model_dump(mode="json")
            if settings["tokens"] == "both":  # raw tokens have the same place in the result of both and of block
                settings["tokens"] = "block"
            probe = Probe(
                task,
                tuple(value["train"]),
                tuple(value["test"]),
                int(value["train_images"]),
                int(value["test_images"]),
                tuple((key, _hashable(settings[key])) for key in _keys_of(task)),
                str(value["images"]),
            )
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{file} is damaged: it does not say what was probed; repeat singer evaluate") from None
        if models.setdefault(probe, value.get("model")) != value.get("model"):
            both = f"{models[probe] or 'a model without name'} and {value.get('model') or 'a model without name'}"
            raise UserError(
                f"{folder} has figures of {both}; keep those of each model in its own folder (evaluate --out)"
            )
        value, names = without_top5(value), (*FIGURES[task], *_ERRORS.get(task, ()))
        figures = {name: figure_in(value, name) for figure in names for name in with_bounds(figure)}
        found[probe] = {name: figure for name, figure in figures.items() if figure is not None}
    return found


def _keys_of(task: str) -> list[str]:
    """List the keys of the section evaluate, apart from seeds, that the figures of a task depend on."""
    found = ((name, about) for name, about in keys(EvaluateConfig) if about.affects == "result" and name != "seed")
    return [name for name, about in found if not about.only or task in about.only]


def columns_of(everything: Iterable[Figures]) -> list[Column]:
    """Return a column for every figure that some model has, task by task."""
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
    """Return the column that ranks the runs, or None if there is none.

    It is the figure `asked` for, or else the default one, or else any, of the probe that most runs have.
    """
    able = [column for column in columns if not column.error]
    for name in (asked, DEFAULT_FIGURE):
        able = [column for column in able if column.name == name] or able
    return max(able, key=lambda c: sum(c.figure in f.get(c.probe, {}) for f in everything), default=None)


def score(
    groups: Mapping[SeedGroup, Sequence[Figures]], columns: Sequence[Column]
) -> dict[SeedGroup, dict[Column, Score]]:
    """Return the mean of every figure over the runs of a group that have it."""
    table: dict[SeedGroup, dict[Column, Score]] = {}
    for group, members in groups.items():
        table[group] = {}
        for column in columns:
            held = [f[column.probe] for f in members if column.figure in f.get(column.probe, {})]
            if held:
                table[group][column] = Score(Mean.of_figure(held, column.figure), len(held))
    return table


def rank(table: Mapping[SeedGroup, Mapping[Column, Score]], by: Column | None) -> list[tuple[int | None, SeedGroup]]:
    """Return (rank, group), best first; equal figures have equal ranks.

    Groups without the figure have rank None and come last, in their order.
    """
    if by is None:
        return [(None, group) for group in table]
    ranked = sorted((g for g in table if by in table[g]), key=lambda g: -table[g][by].mean.mean)
    values = [table[g][by].mean.mean for g in ranked]
    places: list[tuple[int | None, SeedGroup]] = [(1 + values.index(v), g) for v, g in zip(values, ranked, strict=True)]
    return places + [(None, group) for group in table if by not in table[group]]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _labels(probes: Sequence[Probe]) -> dict[Probe, str]:
    """Return a label of every probe: its task and, if a task has several probes, its first test shard or a number."""
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
