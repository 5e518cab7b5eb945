"""The figures of tasks: their names, how they are shown, and their means over seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

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

# The figures of each task that are shown, by their place in its result. All are better where they are larger.
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
    """A stored figure as it is shown: shares, such as delta1, are stored as such; the others are in percent."""
    return 100 * value if figure.endswith("delta1") else float(value)


def figures_of(probes: Iterable[str]) -> list[str]:
    """Names of all figures, such as classification.linear.cls.top1."""
    return [f"{task}.{figure}" for task in probes for figure in FIGURES[task]]


@dataclass(frozen=True)
class Mean:
    """Over the seeds. std: of the sample; None of a single run, whose 95 % interval over test images may be known."""

    mean: float
    std: float | None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)

    @classmethod
    def of_figure(cls, runs: Sequence[Mapping[str, float]], figure: str) -> "Mean":
        """runs: {figure: value} of each, with the bounds of `with_bounds` where they are known."""
        found, bounds = cls.of([run[figure] for run in runs]), with_bounds(figure)[1:]
        if len(runs) > 1 or not all(bound in runs[0] for bound in bounds):
            return found
        low, high = (runs[0][bound] for bound in bounds)
        return replace(found, interval=(low, high))

    @property
    def ends(self) -> tuple[float, float]:
        """Of the line that shows how uncertain it is."""
        return self.interval or (self.mean - (self.std or 0), self.mean + (self.std or 0))

    def text(self, form: str) -> str:
        return form % self.mean + (f" ± {form % self.std}" if self.std is not None else "")


def words_of(figure: str) -> list[str]:
    """Of its parts, for people."""
    return [_WORDS.get(part, part.replace("_", " ")) for part in figure.split(".")]


def with_bounds(figure: str) -> tuple[str, str, str]:
    """A figure, and where evaluate stores its 95 % interval, if it does."""
    return figure, f"{figure}_low", f"{figure}_high"
