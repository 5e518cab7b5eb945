"""Describe a run directory: its files, and what the student learned from which teacher."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.outputs.resuming import CONFIG, RUN_RESULT, STUDENT_FOLDER, TRAINING_CHECKPOINT
from pipeline.runtime.progress import say
from pipeline.storage import Place, is_remote
from pipeline.storage.json_files import read_as, write_json
from singer.errors import UserError
from singer.sizes import ImageSize

RUNS = "runs"

STAGE = "distill"
FINETUNE = "finetune"
PROJECTORS_FILE = "projectors.safetensors"
# Joint training writes this file.
ADAPTERS = "adapters.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TeacherNote:
    """The teacher from which a student learned. weights: SHA-256, as in the cache's manifest.

    variant: one name for its weights, precision, image size and preprocessing.
    """

    name: str
    architecture: str
    weights: str
    image_size: ImageSize
    class_token: bool
    variant: str


@dataclass(frozen=True)
class RefinerKind:
    """The kind of a refiner. The hash of its file is among the run's inputs."""

    cleaner: str
    normaliser: str


@dataclass(frozen=True)
class TeacherLink:
    """What a student learned from one teacher.

    cache: the id of the cache; cache_place: where the cache was; matching: {teacher block: student block}; refiner: the
    folder of the refiner; refiner_kind: what the refiner is. Both are None for raw targets.
    """

    teacher: TeacherNote
    cache: str
    cache_place: str
    matching: dict[int, int]
    refiner: str | None
    refiner_kind: RefinerKind | None


@dataclass(frozen=True)
class Finetuned:
    """How a student was fine-tuned with labels, after it was distilled.

    classes: those of its head; images: how many it was trained on; sources: their shards, folders and lists; loss,
    seconds and the like: as in DistillResult, of this training.
    """

    classes: int
    images: int
    sources: list[str]
    steps: int
    loss: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    kept_epoch: int | None = None


@dataclass(frozen=True)
class DistillResult:
    """A trained student, and what it learned from each of its teachers.

    loss: the mean since the log line before the last; seconds: the duration of training; kept_epoch: the epoch after
    which the student was as it is stored, None for the last; finetuned: how it was fine-tuned, None if it was not.
    """

    run: Path
    student: Path
    teachers: list[TeacherLink]
    parameters: int
    steps: int
    loss: float
    seconds: float
    images_per_second: float
    data_wait_percent: float
    kept_epoch: int | None = None
    finetuned: Finetuned | None = None


def load_result(run: Path) -> DistillResult:
    """Read the result of a finished run. Raises UserError if there is none at `run`."""
    return replace(read_as(run / RUN_RESULT, DistillResult, "finished run"), run=run, student=run / STUDENT_FOLDER)


def resumed_result(run: Path) -> DistillResult:
    """Read the result of a finished run that is resumed, and remove the checkpoint, if it died before it did so."""
    result = load_result(run)
    (run / TRAINING_CHECKPOINT).unlink(missing_ok=True)
    return result


def load_run_config(run: Path) -> Config:
    """Read the configuration of a finished run. Raises UserError if there is none at `run`, or no valid one."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a finished run: it has no {CONFIG}")
    try:
        return load_config(run / CONFIG)
    except UserError as error:
        raise UserError(f"{run / CONFIG} was not written by this version of singer: {error}") from None


def nearby(run: Path, recorded: Iterable[str]) -> Iterator[Place]:
    """Yield the recorded places, and the same names near the run, because folders often move together."""
    above = run.resolve().parent
    for place in recorded:
        if is_remote(place):
            yield place
            continue
        yield Path(place)
        for folder in (above, above.parent):
            for last in (1, 2):
                yield folder.joinpath(*Path(place).parts[-last:])


def write_result(result: DistillResult) -> None:
    """Write the result of a run: the run is finished then. It has no absolute paths, because a run may be moved."""
    write_json(result.run / RUN_RESULT, {**asdict(result), "run": ".", "student": STUDENT_FOLDER})


def find_runs(places: Sequence[Path], quiet: bool = False) -> list[Path]:
    """Return the finished runs among folders of `singer distill` and `singer sweep`.

    quiet: say nothing about unfinished runs, which are left out. Raises UserError, with the folder's name,
    if a folder is neither.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is not a folder; report takes runs of singer distill, or a sweep")
        if (place / RUN_RESULT).is_file():
            found.append(place)
            continue
        if not (place / RUNS).is_dir():
            raise UserError(
                f"{place} is not a finished run: it has no {RUN_RESULT}, nor is it a sweep; finish it with --resume"
            )
        inside = sorted(folder for folder in (place / RUNS).iterdir() if folder.is_dir())
        done = [folder for folder in inside if (folder / RUN_RESULT).is_file()]
        if not done:
            raise UserError(f"{place} is a sweep without a finished run; continue it with singer sweep --resume")
        if len(done) < len(inside) and not quiet:
            say(f"{len(inside) - len(done)} of {len(inside)} runs in {place} are not finished and are left out")
        found += done
    return list({folder.resolve(): folder for folder in found}.values())
