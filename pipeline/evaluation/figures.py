"""The figures of tasks: their names, how they are shown, and their means over seeds."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from singer.errors import UserError

LEADERBOARD = "leaderboard"

_WORDS = {
    "knn": "k-NN",
    "cls": "CLS",
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "map": "mAP",
    "rmse": "RMSE (m)",
}

# The figures of each task that are shown, by their path in its result. For all of them, larger is better.
FIGURES = {
    "classification": ("linear.cls.top1", "linear.mean_patch.top1", "knn.cls.top1", "knn.mean_patch.top1"),
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("bins.delta1", "regression.delta1"),
    "retrieval": ("retrieval.cls.map", "retrieval.mean_patch.map"),
    "domain-shift": ("linear.cls.top1", "linear.mean_patch.top1"),
    "head": ("top1", "top5"),
}
DEFAULT_FIGURE = "classification.linear.mean_patch.top1"


def in_percent(figure: str, value: float) -> float:
    """Return a stored figure in percent, as it is shown.

    delta1 is stored as a share; all others are stored in percent.
    """
    return 100 * value if figure.endswith("delta1") else float(value)


def figure_in(result: Any, path: str) -> float | None:
    """Return a figure of a task's stored result in percent, by its path; None if the result lacks it."""
    for key in path.split("."):
        result = result.get(key) if isinstance(result, dict) else None
    return in_percent(path, result) if isinstance(result, int | float) else None


def figures_of(probes: Iterable[str]) -> list[str]:
    """Return the names of all figures, such as classification.linear.cls.top1."""
    return [f"{task}.{figure}" for task in probes for figure in FIGURES[task]]


def choose_figure(asked: str | None, figures: Sequence[str]) -> str:
    """Return the figure that ranks students: the one asked for, else the default. Raises UserError if it is missing."""
    if asked is None:
        return DEFAULT_FIGURE if DEFAULT_FIGURE in figures else figures[0]
    if asked not in figures:
        near = difflib.get_close_matches(asked, figures, n=1, cutoff=0)[0]
        raise UserError(f"rank_by: no figure {asked!r} among those of its probes; did you mean {near!r}?")
    return asked


@dataclass(frozen=True)
class Mean:
    """The mean of a figure over seeds.

    std: the sample standard deviation, or None for a single run; interval: a single run's 95 % interval over test
    images, if it is known.
    """

    mean: float
    std: float | None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Return the mean of one value for each seed."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    @classmethod
    def of_figure(cls, runs: Sequence[Mapping[str, float]], figure: str) -> "Mean":
        """Return the mean of a figure over runs.

        runs: {figure: value} of each run, with the bounds that `with_bounds` names where they are known.
        """
        found, bounds = cls.of([run[figure] for run in runs]), with_bounds(figure)[1:]
        if len(runs) > 1 or not all(bound in runs[0] for bound in bounds):
            return found
        low, high = (runs[0][bound] for bound in bounds)
        return replace(found, interval=(low, high))

    @property
    def ends(self) -> tuple[float, float]:
        """Return the ends of the line that shows the uncertainty: the interval, or the mean ± std."""
        return self.interval or (self.mean - (self.std or 0), self.mean + (self.std or 0))

    def text(self, form: str) -> str:
        """Return "mean ± std", or the mean alone; form: a printf format such as "%.1f"."""
        return form % self.mean + (f" ± {form % self.std}" if self.std is not None else "")


def words_of(figure: str) -> list[str]:
    """Return the words for the parts of a figure's name."""
    return [_WORDS.get(part, part.replace("_", " ")) for part in figure.split(".")]


def with_bounds(figure: str) -> tuple[str, str, str]:
    """Return the name of a figure and the names of the bounds of its 95 % interval.

    evaluate stores the bounds only for some figures.
    """
    return figure, f"{figure}_low", f"{figure}_high"
