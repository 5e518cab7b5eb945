"""Send the figures of a running run to trackers: TensorBoard, W&B and the others that Accelerate supports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from pipeline.config import TrainingConfig
from pipeline.storage import naming
from singer.errors import UserError, require_known

FOLDER = "tensorboard"
PROJECT = "singer"


class Tracking:
    """The trackers of one run. Only the main process may make an instance.

    out: the run directory; config: the configuration, which W&B shows beside the figures.
    """

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any]) -> None:
        self._out = out
        with naming(out):
            self._trackers = [_started(name, out, config) for name in names]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the figures of a step."""
        with naming(self._out):
            for tracker in self._trackers:
                tracker.log(values, step=step)

    def close(self) -> None:
        """Finish all trackers."""
        with naming(self._out):
            for tracker in self._trackers:
                tracker.finish()


def _started(name: str, out: Path, config: Mapping[str, Any]) -> GeneralTracker:
    """Return a tracker that has been started."""
    tracker = LOGGER_TYPE_TO_CLASS[name]
    if name == "wandb":
        # Each student has a W&B run of its own, also if one process trains several students. The files of W&B are in
        # the run directory.
        own = {"name": out.name, "dir": str(out), "config": dict(config), "reinit": "create_new"}
        made = tracker(PROJECT, **own)
    elif tracker.requires_logging_directory:
        made = tracker(FOLDER, logging_dir=str(out))
    else:
        made = tracker(out.name)
    if hasattr(made, "start"):
        made.start()
    return made


def check_trackers(settings: TrainingConfig) -> None:
    """Raise UserError for a tracker that Accelerate does not know, or that needs a missing package."""
    known, present = sorted(LOGGER_TYPE_TO_CLASS), {str(LoggerType(t)) for t in get_available_trackers()}
    for name in settings.trackers:
        require_known(f"{settings.section}.trackers", name, known)
        if name not in present:
            raise UserError(f"{settings.section}.trackers: {name} is not installed; pip install {name}")
