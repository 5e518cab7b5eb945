"""One piece of a sweep: a refiner to fit, or students to train on one pass and to probe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.config import Config
from pipeline.runtime.failures import Failure, failure
from pipeline.runtime.progress import say
from pipeline.stages.distill import fan_out
from pipeline.stages.evaluate import evaluate_tasks
from pipeline.stages.refine import refine
from pipeline.storage import Place
from pipeline.storage.outputs import Mode
from pipeline.training.run_directory import RUN, RUNS
from pipeline.training.student_run import StudentSpec

REFINERS = "refiners"


@dataclass(frozen=True)
class SweepContext:
    """What all pieces have in common. caches: one for each teacher; command: of the sweep, for the provenance of what
    it makes.
    """

    caches: list[Place]
    out: Path
    shards: list[str] | None
    train: list[str]
    test: list[str]
    command: list[str]

    def refiners(self, name: str) -> list[Path]:
        """The folders of a refiner: one for each cache."""
        folder, count = self.out / REFINERS / name, len(self.caches)
        return [folder] if count == 1 else [folder / str(number) for number in range(1, count + 1)]


@dataclass(frozen=True)
class Task:
    """A refiner or a run. needs: the refiner of a run; probes: the tasks that it has no figures of yet."""

    name: str
    config: Config
    needs: str | None = None
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A refiner, or runs that train on one pass over the data."""

    kind: Literal["refiner", "run"]
    members: tuple[Task, ...]

    @property
    def names(self) -> str:
        return ", ".join(m.name for m in self.members)


def attempt(setting: SweepContext, job: Job) -> dict[str, Failure]:
    """Do the job as far as it is not done; {member: what went wrong}."""
    if job.kind == "refiner":
        (member,) = job.members
        return _failures(member, partial(_fit, setting, member))
    untrained = [m for m in job.members if not (setting.out / RUNS / m.name / RUN).exists()]
    # Where one of several cannot be trained, each is left to its own pass, so that none takes the others along.
    if len(untrained) > 1 and _failures(job.members[0], lambda: _train(setting, untrained)):
        say("these runs do not train together; now one by one")
    failed: dict[str, Failure] = {}
    for member in job.members:
        failed |= _failures(member, partial(_finish, setting, member))
    return failed


def _failures(member: Task, do: Callable[[], object]) -> dict[str, Failure]:
    try:
        do()
    except Exception as error:  # no run may take the others along, whatever its model or its GPU does
        return {member.name: failure(error)}
    return {}


def _fit(setting: SweepContext, member: Task) -> None:
    for number, (cache, out) in enumerate(zip(setting.caches, setting.refiners(member.name), strict=True)):
        refine(refiner_config(member.config, number), cache, out, _mode(out))


def refiner_config(config: Config, number: int) -> Config:
    """Of the refiner of one cache, counted from 0: where the students' teachers are named, it is fitted to its own."""
    teachers = config.distill.teachers
    if teachers is None or number >= len(teachers):
        return config
    return config.model_copy(update={"refine": config.refine.model_copy(update={"teacher": teachers[number]})})


def _train(setting: SweepContext, members: Sequence[Task]) -> None:
    jobs = []
    for member in members:
        refiner = setting.refiners(member.needs) if member.needs is not None else None
        jobs.append(StudentSpec(member.config, setting.out / RUNS / member.name, refiner))
    # A folder that is there is continued, and one that is not is begun.
    fan_out(jobs, setting.caches, setting.shards, "resume" if any(j.out.exists() for j in jobs) else "new")


def _finish(setting: SweepContext, member: Task) -> None:
    run = setting.out / RUNS / member.name
    if not (run / RUN).exists():
        _train(setting, [member])
    if member.probes:
        evaluate_tasks(member.config, run, setting.train, setting.test, member.probes)


def is_done(run: Path, figures: Mapping[str, Path]) -> bool:
    """Whether a run is trained and has all figures. figures: {task: their file}."""
    return (run / RUN).exists() and all(file.exists() for file in figures.values())


def _mode(out: Path) -> Mode:
    return "resume" if out.exists() else "new"


def as_list(shards: str | Sequence[str] | None) -> list[str]:
    return [shards] if isinstance(shards, str) else list(shards or ())
