"""What all chains do after their images are packed: cache, refine, distil, probe and report, each by its stage."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.chains.steps import Steps
from pipeline.config import Config
from pipeline.models.names import is_function
from pipeline.outputs.chain_folder import CACHE, REFINER
from pipeline.runtime.progress import say
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.refine import refine
from pipeline.stages.report import report

# The configuration with all choices of a chain, which the commands that repeat a stage read.
PLANNED = "planned.yaml"
SHARDS, PROBES, PAGE = "shards", "probes", "report.html"


@dataclass(frozen=True)
class Stage:
    """A stage of a chain. command: repeats it alone, if that makes sense; together: whether all processes do it."""

    name: str
    title: str
    command: str | None
    work: Callable[[], Any]
    together: bool

    def follow(self, steps: Steps) -> Any:
        """Do the stage as a step. Return its result."""
        do = steps.together if self.together else steps.alone
        result = do(self.name, self.title, self.work)
        if steps.main and self.command is not None:
            say(f"    repeat it alone: {self.command}")
        return result


def command(*words: object) -> str:
    """Return a command of singer, quoted for a shell."""
    return shlex.join(["singer", *map(str, words)])


def repeated(option: str, values: Sequence[str]) -> list[str]:
    """Return an option with each of its values."""
    return [word for value in values for word in (option, value)]


@dataclass(frozen=True)
class Learning:
    """The stages of a chain that has its shards.

    out: its folder; train: shards that are cached; probe, test: shards of the probes, none without labels; students:
    {folder: whether it learns from refined features, for which a refiner is fitted}; title, note: of the page.
    """

    config: Config
    out: Path
    train: Sequence[str]
    probe: Sequence[str]
    test: Sequence[str]
    students: Mapping[str, bool]
    title: str = "Students of one teacher"
    note: str | None = None

    @property
    def planned(self) -> list[object]:
        """Return the options that give a command the chain's configuration."""
        return ["--config", self.out / PLANNED]

    def stages(self, steps: Steps) -> Iterator[Stage]:
        """Yield the stages in their order."""
        yield self._cache(steps)
        if any(self.students.values()):
            yield self._refiner(steps)
        for name, refined in self.students.items():
            yield self._student(steps, name, refined)
        if self.test:
            for name in self.students:
                title = "probing the student" + (f" {name}" if len(self.students) > 1 else "")
                yield self._probe(f"probe {name}", title, self.out / name, None)
            yield self._probe("probe teacher", "probing the teacher", None, self.out / PROBES)
        yield self._report()

    def _cache(self, steps: Steps) -> Stage:
        out, shards = self.out / CACHE, repeated("--images", self.train)
        return Stage(
            CACHE,
            "caching the teacher's features",
            command("cache-teacher", *self.planned, *shards, "--out", out, "--overwrite"),
            lambda: cache_teacher(self.config, self.train, out, steps.resumed),
            together=True,
        )

    def _refiner(self, steps: Steps) -> Stage:
        cache, out = self.out / CACHE, self.out / REFINER
        return Stage(
            REFINER,
            "refining: fitting a refiner to the cache",
            command("refine", *self.planned, "--cache", cache, "--out", out, "--overwrite"),
            lambda: refine(self.config, cache, out, steps.resumed),
            together=True,
        )

    def _student(self, steps: Steps, name: str, refined: bool) -> Stage:
        cache, out, refiner = self.out / CACHE, self.out / name, self.out / REFINER if refined else None
        given = ["--refiner", refiner] if refiner else []
        if self.config.distill.joint:
            kind = "and its adapters (joint training)"
        else:
            kind = "from refined features (SiNGER)" if refined else "from raw features (FitNet)"
        return Stage(
            name,
            f"distilling a student {kind}",
            command("distill", *self.planned, "--cache", cache, *given, "--out", out, "--overwrite"),
            lambda: distill(self.config, cache, out, refiner, mode=steps.resumed),
            together=True,
        )

    def _probe(self, name: str, title: str, run: Path | None, out: Path | None) -> Stage:
        """Return the probe of a student in its run, or of the teacher, whose figures go to `out`."""
        teacher = self.config.teacher
        model, weights = (run, None) if run is not None else (teacher.name, teacher.weights)
        more = [*(["--weights", weights] if weights else []), *(["--out", out] if out else [])]
        shards = [*repeated("--train", self.probe), *repeated("--test", self.test)]
        return Stage(
            name,
            title,
            command("evaluate", model, *self.planned, *shards, *more),
            lambda: asdict(evaluate(self.config, model, self.probe, self.test, out=out, weights=weights))["linear"],
            together=False,
        )

    def _report(self) -> Stage:
        runs, page = [self.out / name for name in self.students], self.out / PAGE
        probes = self.out / PROBES if self.test else None
        own = [name for name in (self.config.student.name,) if is_function(name)]
        given = [*(["--teacher-probes", probes] if probes else []), *repeated("--student", own)]
        return Stage(
            "report",
            "writing the report",
            command("report", *runs, "--out", page, *given, "--title", self.title, "--overwrite"),
            lambda: (
                report(
                    runs,
                    page,
                    teacher_probes=probes,
                    students=own,
                    title=self.title,
                    note=self.note,
                    overwrite=page.exists(),
                ).mean_max_over_median
            ),
            together=False,
        )
