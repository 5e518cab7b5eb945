"""Figures of a run while it goes on, in the trackers that people look at: TensorBoard, W&B, what Accelerate has."""

from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

FOLDER = "tensorboard"


class Tracking:
    """The trackers of one run. Only the main process may make one."""

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in names:
            tracker = LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": str(out)} if tracker.requires_logging_directory else {}
            # A folder of a fixed name in the run, or a run that is called after its folder.
            made = tracker(FOLDER if where else out.name, **where)
            if hasattr(made, "start"):
                made.start()
            self._trackers.append(made)

    def log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that Accelerate does not know, or whose package is missing."""
    known, present = sorted(LOGGER_TYPE_TO_CLASS), {str(LoggerType(t)) for t in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ValueError(f"distill.trackers: unknown {name!r}; known: {', '.join(known)}")
        if name not in present:
            raise ValueError(f"distill.trackers: {name} is not installed; pip install {name}")
