"""Charts as SVG within the page, in the colours of its text, so that they are legible in light and in dark mode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from pipeline.evaluation.figures import Mean
from pipeline.reports.html import as_svg
from pipeline.reports.measurements import Measurement
from pipeline.reports.scores import Column, Score
from pipeline.reports.seeds import SeedGroup
from pipeline.training.run_log import read_log

# These colours have a middle lightness, so that they are legible on white and on black.
COLOURS = ("#3b82f6", "#e8590c", "#2b9a66", "#9d5cf0", "#d6409f", "#0e9aa7", "#a08300", "#e5484d")
_GREY = "#8a8a8a"
# In inches.
_WIDTH, _NARROW = 4.6, 2.3
# From so many epochs on, a training curve shows the mean of each epoch.
_SMOOTH = 4
_STYLE: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def colour(number: int) -> str:
    """Return the colour of the student with this number, counted from 0; from the ninth student on, it is grey."""
    return COLOURS[number] if number < len(COLOURS) else _GREY


def tasks(
    groups: Sequence[SeedGroup],
    table: Mapping[SeedGroup, Mapping[Column, Score]],
    columns: Sequence[Column],
    teacher: Mapping[Column, float],
) -> list[tuple[Column, str]]:
    """Draw a bar chart of every figure, with a bar for each student (the paper's Figure 1b).

    A dotted line shows the teacher. Figures that are errors have no chart.
    """
    charts = []
    for column in (c for c in columns if not c.error):
        held = [(n, table[group][column].mean) for n, group in enumerate(groups) if column in table[group]]
        figure, axes = _figure(0.34 + 0.2 * len(held), _NARROW)
        axis = axes[0, 0]
        for place, (number, mean) in enumerate(held):
            axis.barh(place, mean.mean, 0.72, color=colour(number), xerr=_around(mean), error_kw={"elinewidth": 1})
            end = (mean.ends[1], place)
            axis.annotate(column.form % mean.mean, end, (3, 0), textcoords="offset points", va="center", fontsize=9)
        if column in teacher:
            axis.axvline(teacher[column], color="black", linewidth=1.2, linestyle=":")
        axis.set_ylim(len(held) - 0.4, -0.6)
        axis.set_yticks([])
        most = max([m.ends[1] for _, m in held] + [teacher.get(column, 0)])
        axis.set_xlim(0, 1.17 * most or 1)
        charts.append((column, as_svg(figure, f"Bar chart of {', '.join(column.label)}, a bar for each student")))
    return charts


def _around(mean: Mean) -> np.ndarray:
    """Return how far the line of uncertainty extends down and up, (2, 1)."""
    return np.abs(np.array(mean.ends) - mean.mean)[:, None]


def losses(groups: Sequence[SeedGroup], file: str) -> str:
    """Draw the training loss of every run over its epochs, relative to its first value.

    It is relative, because targets have different units.
    """
    figure, axes = _figure(2.9)
    axis = axes[0, 0]
    for number, group in reversed([*enumerate(groups)]):
        for run in group.runs:
            lines = [line for line in read_log(run.folder / file) if np.isfinite(line.get("loss", np.nan))]
            if lines and lines[0]["loss"] > 0:
                loss = np.array([line["loss"] for line in lines]) / lines[0]["loss"]
                epochs = np.array([line["epoch"] for line in lines])
                whole = np.ceil(epochs)
                # The noisy curve of a long run would hide the others, so it is pale and its means are drawn over it.
                pale = epochs[-1] >= _SMOOTH
                style = {"linewidth": 0.7, "alpha": 0.25} if pale else {"linewidth": 1.4, "alpha": 0.9}
                axis.plot(epochs, loss, color=colour(number), **style)
                if pale:
                    means = [loss[whole == epoch].mean() for epoch in np.unique(whole)]
                    axis.plot(np.unique(whole) - 0.5, means, color=colour(number), linewidth=1.6)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss / first loss")
    return as_svg(figure, "Training loss of every run, relative to its first value, over epochs")


# {what is measured on held-out images: its value in a line of the log}.
_HELD_OUT: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "explained variance": lambda line: (
        float(np.mean([*line["explained_variance"].values()])) if line.get("explained_variance") else None
    ),
    "k-NN (%)": lambda line: line.get("held_out_knn"),
    "top-1 (%)": lambda line: line.get("held_out_top1"),
}


def held_out(groups: Sequence[SeedGroup], file: str) -> str | None:
    """Draw over the epochs what was measured on held-out images, a chart below the other; None if nothing was."""
    curves: dict[str, list[tuple[int, list[tuple[float, float]]]]] = {}
    for number, group in reversed([*enumerate(groups)]):
        for run in group.runs:
            lines = read_log(run.folder / file)
            for what, value in _HELD_OUT.items():
                points = [(line["epoch"], found) for line in lines if (found := value(line)) is not None]
                if points:
                    curves.setdefault(what, []).append((number, points))
    if not curves:
        return None
    figure, axes = _figure(0.9 + 1.7 * len(curves), rows=len(curves))
    for axis, what in zip(axes[:, 0], (w for w in _HELD_OUT if w in curves), strict=True):
        for number, points in curves[what]:
            axis.plot(*zip(*points, strict=True), color=colour(number), linewidth=1.4, alpha=0.9, marker=".")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_ylabel(what)
    axes[-1, 0].set_xlabel("epoch")
    return as_svg(figure, f"Figures of held-out images over epochs: {', '.join(curves)}")


@dataclass(frozen=True)
class Curve:
    """The losses of a refiner's adapters.

    style: the style of the line, as CSS names it; lines: [{"step", "outlier", "info"}].
    """

    title: str
    colour: str
    style: str
    lines: list[dict[str, Any]]


def fits(curves: Sequence[Curve]) -> str:
    """Draw the adapters' two losses over steps: that of artifacts, and that of drift."""
    figure, axes = _figure(3.6, rows=2)
    above, below = axes[:, 0]
    for curve in curves:
        for axis, part in ((above, "outlier"), (below, "info")):
            pairs = [(line["step"], line[part]) for line in curve.lines if line[part] > 0]
            axis.plot(*zip(*pairs, strict=True), color=curve.colour, linestyle=curve.style, linewidth=1.4)
    for axis, name in ((above, "artifacts\n(L_outlier)"), (below, "drift\n(L_info)")):
        axis.set_yscale("log")
        axis.set_ylabel(name)
    below.set_xlabel("step")
    return as_svg(figure, "Losses of the adapters over steps: artifacts above, drift below")


def norms(measurements: Sequence[Measurement], colours: Mapping[str, str]) -> list[tuple[str, str]]:
    """Draw box plots of patch norms by block for every model (the paper's Figure 5); return (title, chart) of each.

    Norms are in units of the block's median. All charts have the same axis.
    """
    boxes = {
        measurement.title: [
            box_of((measurement.norms[b] / measurement.norms[b].median()).numpy(), str(b))
            for b in sorted(measurement.norms)
        ]
        for measurement in measurements
    }
    low = min(box["whislo"] for found in boxes.values() for box in found)
    high = max(box["fliers"][0] for found in boxes.values() for box in found)
    charts = []
    for title, found in boxes.items():
        figure, axes = _figure(1.7, _NARROW)
        axis, line = axes[0, 0], {"color": colours.get(title, "black")}
        axis.bxp(
            found, widths=0.6, boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 2},
            flierprops={"marker": "o", "markersize": 4, "markeredgecolor": "none", "markerfacecolor": line["color"]},
        )  # fmt: skip
        axis.set_yscale("log")
        axis.set_ylim(low / 1.2, high * 1.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(axis="y", color=_GREY, alpha=0.25)
        # If there are many blocks, only some have a number.
        for number, label in enumerate(axis.get_xticklabels()):
            label.set_visible(number % -(-len(found) // 8) == 0)
        charts.append((title, as_svg(figure, f"Box plots of the patch norms of {title} by block")))
    return charts


def box_of(values: np.ndarray, label: str) -> dict[str, Any]:
    """Return the box of some values: quartiles, whiskers at 1 and 99 %, and the largest as a point."""
    low, first, median, third, high, most = np.quantile(values, [0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
    return {"label": label, "whislo": low, "q1": first, "med": median, "q3": third, "whishi": high, "fliers": [most]}


def read_fit(folder: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Read the logs of adapters: {file's stem: its lines, each with step and the losses summed over blocks}."""
    curves = {}
    for file in sorted(folder.glob(pattern)):
        lines = []
        for line in read_log(file):
            parts = {**line, **line.get("parts", {})}
            sums = {
                kind: sum(v for name, v in parts.items() if name.split(".")[0] == kind) for kind in ("outlier", "info")
            }
            if any(name.split(".")[0] == "outlier" for name in parts):
                lines.append({"step": line["step"], **sums})
        if lines:
            curves[file.stem] = lines
    return curves


def _figure(height: float, width: float = _WIDTH, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """Return a figure that fits a phone, and its axes (rows, 1); height and width are in inches."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes: np.ndarray = figure.subplots(rows, 1, squeeze=False)
    return figure, axes
