"""One piece of a sweep: a refiner to fit, or a student to train and to probe. Knows nothing of the others."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.distill import RUN, distill
from pipeline.evaluate import evaluate
from pipeline.outputs import Mode
from pipeline.refine import refine
from pipeline.stores import Place

REFINERS = "refiners"
RUNS = "runs"


@dataclass(frozen=True)
class Setting:
    """What all pieces have in common. command: of the sweep, for the provenance of what it makes."""

    cache: Place
    out: Path
    shards: list[str] | None
    train: list[str]
    test: list[str]
    command: list[str]


@dataclass(frozen=True)
class Job:
    """needs: the refiner of a run; probes: the tasks that it has no figures of yet."""

    kind: Literal["refiner", "run"]
    name: str
    config: Config
    needs: str | None = None
    probes: tuple[str, ...] = ()


def attempt(setting: Setting, job: Job) -> str | None:
    """Do the job as far as it is not done; what went wrong, in one line, or None."""
    try:
        if job.kind == "refiner":
            out = setting.out / REFINERS / job.name
            refine(job.config, setting.cache, out, _mode(out))
        else:
            _train(setting, job)
    except (ValueError, OSError) as error:
        return one_line(error)
    except Exception as error:  # no run may take the others along, whatever its model or its GPU does
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {one_line(error)}"
    return None


def _train(setting: Setting, job: Job) -> None:
    run = setting.out / RUNS / job.name
    if not (run / RUN).exists():
        adapters = setting.out / REFINERS / job.needs if job.needs is not None else None
        distill(job.config, setting.cache, run, adapters, setting.shards, _mode(run))
    for task in job.probes:
        evaluate(job.config, run, setting.train, setting.test, task)


def is_done(run: Path, figures: Mapping[str, Path]) -> bool:
    """Whether a run is trained and has all figures. figures: {task: their file}."""
    return (run / RUN).exists() and all(file.exists() for file in figures.values())


def _mode(out: Path) -> Mode:
    return "resume" if out.exists() else "new"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def as_list(shards: str | Sequence[str] | None) -> list[str]:
    return [shards] if isinstance(shards, str) else list(shards or ())
