"""The jobs of a sweep: a refiner to fit, or students to train on one pass and to probe."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.data import Spec
from pipeline.outputs.folder import Mode
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.runtime.failures import Failure, failure
from pipeline.runtime.progress import say
from pipeline.stages.distill import fan_out
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.storage import Place
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.run_directory import RUNS

REFINERS = "refiners"


@dataclass(frozen=True)
class SweepContext:
    """The settings that all jobs share.

    caches: one for each teacher; command: the command line of the sweep, for the provenance of its outputs.
    """

    caches: list[Place]
    out: Path
    images: list[str] | None
    train: list[str]
    test: list[str]
    command: list[str]

    def refiners(self, name: str) -> list[Path]:
        """Return the folders of a refiner, one for each cache."""
        folder, count = self.out / REFINERS / name, len(self.caches)
        return [folder] if count == 1 else [folder / str(number) for number in range(1, count + 1)]


@dataclass(frozen=True)
class Member:
    """A refiner or a run in a job; needs: the refiner of a run; probes: the tasks that it has no figures for yet."""

    name: str
    config: Config
    needs: str | None = None
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A refiner, or runs that train on one pass over the data."""

    kind: Literal["refiner", "run"]
    members: tuple[Member, ...]

    @property
    def names(self) -> str:
        """Return the names of the members, separated by commas."""
        return ", ".join(m.name for m in self.members)


def attempt(setting: SweepContext, job: Job) -> dict[str, Failure]:
    """Do the parts of a job that are not done yet, and return {member: failure}."""
    if job.kind == "refiner":
        (member,) = job.members
        return _failures(member, partial(_fit, setting, member))
    untrained = [m for m in job.members if not (setting.out / RUNS / m.name / RUN_RESULT).exists()]
    # If students cannot train together, each gets its own pass, so that one student's failure does not stop the others.
    if len(untrained) > 1 and (together := _failures(job.members[0], lambda: _train(setting, untrained))):
        if any(failure.full for failure in together.values()):
            return together
        say("these runs do not train together; they now train one by one")
    failed: dict[str, Failure] = {}
    for member in job.members:
        failed |= _failures(member, partial(_finish, setting, member))
    return failed


def _failures(member: Member, do: Callable[[], object]) -> dict[str, Failure]:
    try:
        do()
    except Exception as error:  # one run's failure, of whatever kind, must not stop the others
        return {member.name: failure(error)}
    return {}


def _fit(setting: SweepContext, member: Member) -> None:
    for number, (cache, out) in enumerate(zip(setting.caches, setting.refiners(member.name), strict=True)):
        refine(refiner_config(member.config, number), cache, out, _mode(out))


def refiner_config(config: Config, number: int) -> Config:
    """Return the configuration of a cache's refiner; number: that of the cache, counted from 0.

    If distill.teacher names the students' teachers, the refiner is fitted to the one of its cache.
    """
    teachers = config.distill.teachers
    if teachers is None or number >= len(teachers):
        return config
    return config.changed(refine={"teacher": teachers[number]})


def _train(setting: SweepContext, members: Sequence[Member]) -> None:
    specs = []
    for member in members:
        refiner = setting.refiners(member.needs) if member.needs is not None else None
        specs.append(StudentSpec(member.config, setting.out / RUNS / member.name, refiner))
    # The mode resume continues a folder that exists and begins one that does not.
    fan_out(specs, setting.caches, setting.images, "resume" if any(s.out.exists() for s in specs) else "new")


def _finish(setting: SweepContext, member: Member) -> None:
    run = setting.out / RUNS / member.name
    if not (run / RUN_RESULT).exists():
        _train(setting, [member])
    if member.probes:
        evaluate_tasks(member.config, run, setting.train, setting.test, member.probes)


def is_done(run: Path, figures: Mapping[str, Path]) -> bool:
    """Return whether a run is trained and has all figures; figures: {task: file of its figures}."""
    return (run / RUN_RESULT).exists() and all(file.exists() for file in figures.values())


def _mode(out: Path) -> Mode:
    return "resume" if out.exists() else "new"


def as_list(spec: Spec | None) -> list[str]:
    """Return a specification as a list, which is empty if there is none."""
    return [os.fspath(spec)] if isinstance(spec, str | Path) else [os.fspath(one) for one in spec or ()]
