"""The folder of a student: its files, and what it learned from whom."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.storage.outputs import read_as

RUNS = "runs"

STAGE = "distill"
STUDENT = "student"
PROJECTORS_FILE = "projectors.safetensors"
# Of joint training.
ADAPTERS = "adapters.safetensors"
CHECKPOINT = "checkpoint.pt"
RUN = "run.json"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TeacherNote:
    """Whose features a student learned from. weights: SHA-256, as in the cache's manifest.

    variant: the name of its weights, precision, size and preprocessing together; old runs have None.
    """

    name: str
    architecture: str
    weights: str
    image_size: int
    class_token: bool
    variant: str | None = None


@dataclass(frozen=True)
class RefinerNote:
    """What refined them; the hash of its file is among the inputs."""

    cleaner: str
    normaliser: str


@dataclass(frozen=True)
class TeacherLink:
    """What a student learned from one teacher. matching: {teacher block: student block}.

    refiner: None without adapters. cache_place: where the cache was. Runs from before these notes have None for them.
    """

    cache: str
    adapters: str | None
    matching: dict[int, int]
    teacher: TeacherNote | None
    refiner: RefinerNote | None
    cache_place: str | None = None


@dataclass(frozen=True)
class DistillResult:
    """A trained student, and what it learned from its first teacher: see Taught; of several, others holds the rest.

    loss: mean since the log line before the last.
    """

    run: Path
    student: Path
    cache: str
    adapters: str | None
    matching: dict[int, int]
    parameters: int
    steps: int
    loss: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    teacher: TeacherNote | None = None
    refiner: RefinerNote | None = None
    cache_place: str | None = None
    others: list[TeacherLink] = field(default_factory=list)

    @property
    def taught(self) -> list[TeacherLink]:
        """By each teacher."""
        first = TeacherLink(self.cache, self.adapters, self.matching, self.teacher, self.refiner, self.cache_place)
        return [first, *self.others]


def load_result(run: Path) -> DistillResult:
    """The result of a finished run. Raises UserError if there is none at `run`."""
    return replace(read_as(run / RUN, DistillResult, "finished run"), run=run, student=run / STUDENT)
