"""Stage 3: train students on frozen refined targets, computed on the fly from the cached features.

`singer distill --cache CACHE --adapters ADAPTERS --out RUN`, or `accelerate launch cli.py distill ...` on several
processes. Without adapters the targets are the raw features: the FitNet baseline. Sees only the cache and the images.

Several students that share the data train on one pass over it (`fan_out`), each as it would alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3

from pipeline.cache.reader import Cache
from pipeline.checkpoint import Checkpoint, RunLog
from pipeline.config import Config
from pipeline.devices import make_accelerator
from pipeline.distiller import Distiller, Joint, Targets, new_joint
from pipeline.models import Backbone, new_student, save_backbone
from pipeline.outputs import (
    INPUTS,
    Mode,
    check_inputs,
    check_output,
    claimed_output,
    file_hash,
    read_as,
    write_json,
    write_tensors,
)
from pipeline.progress import Meter, say
from pipeline.readplan import steps_per_epoch
from pipeline.refine import REFINER, RefinerManifest, load_refiner, read_refiner
from pipeline.shards import ImageFile, relocate
from pipeline.stores import Place
from pipeline.tracking import Tracking, check_trackers
from pipeline.train import BatchLoader, Trainee, train
from singer.backbones import depth
from singer.matching import match_blocks
from singer.objectives import OBJECTIVES
from singer.refiner import Refiner

STAGE = "distill"
STUDENT = "student"
PROJECTORS = "projectors.safetensors"
# Of joint training.
ADAPTERS = "adapters.safetensors"
CHECKPOINT = "checkpoint.pt"
RUN = "run.json"
LOG = "log.jsonl"
# What students must share to be trained on one pass.
SHARED = (
    "seed", "epochs", "batch_size", "precision", "workers", "read_block", "shuffle_window", "teacher", "blocks",
    "local_copy",
)  # fmt: skip


@dataclass(frozen=True)
class TeacherNote:
    """Whose features a student learned from. weights: SHA-256, as in the cache's manifest."""

    name: str
    architecture: str
    weights: str
    image_size: int
    class_token: bool


@dataclass(frozen=True)
class RefinerNote:
    """What refined them; the hash of its file is among the inputs."""

    cleaner: str
    normaliser: str


@dataclass(frozen=True)
class DistillResult:
    """A trained student. loss: mean since the log line before the last; matching: {teacher block: student block}.

    refiner: None without adapters. cache_place: where the cache was. Runs from before these notes have None for them.
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


@dataclass(frozen=True)
class Job:
    """A student to be trained: its configuration, where the run goes, and the refiner of its targets, if any."""

    config: Config
    out: Path
    adapters: Path | None = None


def distill(
    config: Config,
    cache_path: Place,
    out: Path,
    adapters: Path | None = None,
    shards: str | Sequence[str] | None = None,
    mode: Mode = "new",
) -> DistillResult:
    """Train a student and store it at `out`. Raises ValueError for whatever the user can mend.

    shards: where the cached shards lie now, if they have moved since they were cached.
    """
    return fan_out([Job(config, out, adapters)], cache_path, shards, mode)[0]


def fan_out(
    jobs: Sequence[Job], cache_path: Place, shards: str | Sequence[str] | None = None, mode: Mode = "new"
) -> list[DistillResult]:
    """Train several students on one pass over the cache, each as it would be alone.

    Raises ValueError for whatever the user can mend, and if the jobs differ in what they must SHARE.
    """
    check_shared(jobs)
    settings = jobs[0].config.distill
    fitted = [read_refiner(job.adapters) if job.adapters is not None else None for job in jobs]
    cache, *others = (open_cache(job, note, cache_path) for job, note in zip(jobs, fitted, strict=True))
    for job, other in zip(jobs[1:], others, strict=True):
        if (other.manifest.id(), other.blocks) != (cache.manifest.id(), cache.blocks):
            raise ValueError(f"{jobs[0].out} and {job.out} cannot train on one pass: they learn from different blocks")
    results: dict[Path, DistillResult] = {}
    for job in jobs:
        check_output(job.out, mode, STAGE, job.config, inputs_of(job, cache_path, cache))
        if mode == "resume" and (job.out / INPUTS).exists():
            check_inputs(job.out, input_hashes(job, cache))
            if (job.out / RUN).exists():
                results[job.out] = load_result(job.out)
                (job.out / CHECKPOINT).unlink(missing_ok=True)
    images = open_images(cache, shards)
    accelerator = make_accelerator(settings.precision)
    made = [
        NewStudent(job, note, cache, accelerator)
        for job, note in zip(jobs, fitted, strict=True)
        if job.out not in results
    ]
    main = accelerator.is_main_process
    with ExitStack() as claims:
        for new in made if main else ():
            claims.enter_context(claimed_output(new.job.out, mode, STAGE, new.job.config, settings.seed))
        if made:
            results |= run_jobs(made, cache, images, mode, accelerator)
    return [results[job.out] for job in jobs]


def open_cache(job: Job, note: RefinerManifest | None, cache_path: Place) -> Cache:
    """The cache, for the teacher and the blocks that a job learns from: those asked for, or else its refiner's."""
    settings = job.config.distill
    blocks, teacher = settings.blocks, settings.teacher
    if note is not None:
        blocks, teacher = blocks or tuple(note.scales), teacher or note.teacher
    return Cache(cache_path, teacher, blocks, settings.local_copy)


def check_shared(jobs: Sequence[Job]) -> None:
    """Raise ValueError if the jobs cannot train on one pass, or one of them cannot train at all."""
    first, *others = jobs
    if others and first.config.distill.precision == "fp16":
        raise ValueError("students of one pass would share fp16's loss scale; train them one by one, or in bf16")
    for job in jobs:
        settings = job.config.distill
        unknown = [name for name in settings.objectives if name not in OBJECTIVES]
        if unknown:
            raise ValueError(f"distill.objective: unknown {unknown[0]!r}; known: {', '.join(OBJECTIVES)}")
        if settings.joint and job.adapters is not None:
            raise ValueError("distill.joint trains adapters of its own; leave --adapters out, or distill.joint")
    for job in others:
        for key in SHARED:
            ours, theirs = (getattr(j.config.distill, key) for j in (first, job))
            if ours != theirs:
                raise ValueError(
                    f"{first.out} and {job.out} cannot train on one pass: distill.{key} is {ours} and {theirs}"
                )
    if len({job.out for job in jobs}) < len(jobs):
        raise ValueError("two students of one pass cannot have the same output folder")


def inputs_of(job: Job, cache_path: Place, cache: Cache) -> list[Place]:
    return [cache_path, *filter(None, [job.adapters]), *cache.index.images.paths]


def input_hashes(job: Job, cache: Cache) -> dict[str, str | None]:
    return {"cache": cache.id, "adapters": file_hash(job.adapters / REFINER) if job.adapters is not None else None}


class NewStudent:
    """A student that is built, with all it needs, but has not touched its output yet."""

    def __init__(self, job: Job, note: RefinerManifest | None, cache: Cache, accelerator: Accelerator) -> None:
        self.job, self.note = job, note
        settings, teacher, device = job.config.distill, cache.manifest.teacher, accelerator.device
        refiner = load_refiner(job.adapters, cache) if job.adapters is not None else None
        set_seed(settings.seed)
        self.student: Backbone = new_student(job.config.student, teacher.image_size)
        if job.config.student.checkpointing:
            self.student.model.set_grad_checkpointing(True)
        matching = match_blocks(cache.blocks, teacher.depth, depth(self.student.model))
        self.inputs = input_hashes(job, cache)
        targets = Targets(cache, refiner, self.student, device)
        check_trackers(settings.trackers)
        joint: Joint | None = None
        self.fresh: Refiner | None = None
        if settings.joint:
            joint, self.fresh = new_joint(cache, job.config.refine, device)
        self.distiller = Distiller(
            self.student, matching, targets, settings.objectives, settings.projector, self.fresh, joint,
            settings.kd_weight,
        ).to(device)  # fmt: skip
        # Without those that the objectives do not read.
        self.matching = self.distiller.matching
        self.ema = ModelEmaV3(self.student.model, settings.ema) if settings.ema is not None else None

    def matched(self, cache: Cache) -> str:
        """8 (192, 14 x 14) -> 2 (96, 8 x 8), ..."""
        teacher = cache.manifest.teacher

        def place(block: int, width: int, grid: tuple[int, int]) -> str:
            return f"{block} ({width}, {grid[0]} x {grid[1]})"

        return ", ".join(
            f"{place(t, teacher.width, teacher.grid)} -> {place(s, *self.student.layout[s])}"
            for t, s in self.matching.items()
        )

    def trainee(self, mode: Mode, accelerator: Accelerator) -> Trainee:
        """Ready to train, from its last checkpoint if it has one."""
        settings, out = self.job.config.distill, self.job.out
        trainable = [p for p in self.distiller.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
        parts = {"model": self.distiller, "optimiser": optimiser, "scaler": accelerator.scaler, "ema": self.ema}
        checkpoint = Checkpoint(out / CHECKPOINT, parts, settings.checkpoint_minutes)
        first = checkpoint.restore(accelerator.device) if mode == "resume" else 0
        model, optimiser = accelerator.prepare(self.distiller, optimiser)
        if settings.compile:
            model = torch.compile(model)
        log = RunLog(out / LOG, first, accelerator.is_main_process)
        tracking = Tracking(settings.trackers, out) if accelerator.is_main_process else None
        return Trainee(settings, self.student, model, optimiser, checkpoint, log, tracking, first, self.ema)


def run_jobs(
    made: Sequence[NewStudent],
    cache: Cache,
    images: AbstractContextManager[ImageFile | None],
    mode: Mode,
    accelerator: Accelerator,
) -> dict[Path, DistillResult]:
    """Train and store, once everything has been checked and the outputs are ours."""
    for new in made if accelerator.is_main_process else ():
        write_json(new.job.out / INPUTS, new.inputs)
        say(f"teacher block -> student block (width, grid): {new.matched(cache)}")
        last, supervised = depth(new.student.model) - 1, max(new.matching.values())
        if supervised < last:
            say(f"note: nothing trains the student behind block {supervised}; probes read its last block, {last}")
    accelerator.wait_for_everyone()
    trainees = [new.trainee(mode, accelerator) for new in made]
    with images as files:
        m = train(trainees, BatchLoader(cache, files, [new.student.image_size for new in made]), accelerator)
    results = {}
    for new, trainee in zip(made, trainees, strict=True):
        results[new.job.out] = result = describe(new, trainee, cache, m)
        if accelerator.is_main_process:
            store(new, result)
            trainee.checkpoint.path.unlink(missing_ok=True)
            if trainee.tracking is not None:
                trainee.tracking.close()
    accelerator.wait_for_everyone()
    return results


def describe(new: NewStudent, trainee: Trainee, cache: Cache, m: Meter) -> DistillResult:
    teacher, settings, job = cache.manifest.teacher, new.job.config.distill, new.job
    return DistillResult(
        run=job.out,
        student=job.out / STUDENT,
        cache=cache.id,
        adapters=str(job.adapters) if job.adapters is not None else None,
        matching=new.matching,
        parameters=sum(p.numel() for p in new.student.model.parameters()),
        steps=settings.epochs * steps_per_epoch(len(cache), settings.batch_size),
        loss=trainee.loss,
        seconds=m.seconds,
        images_per_second=m.rate,
        data_wait_percent=m.wait_percent,
        teacher=TeacherNote(
            teacher.name, teacher.architecture, teacher.weights, teacher.image_size, teacher.class_token
        ),
        refiner=RefinerNote(new.note.cleaner, new.note.normaliser) if new.note is not None else None,
        cache_place=str(cache.place),
    )


def store(new: NewStudent, result: DistillResult) -> None:
    """The student (its moving average, if there is one) and what was trained beside it; the result comes last."""
    out = new.job.out
    student = new.student.model if new.ema is None else new.ema.module
    save_backbone(new.student, student.state_dict(), out / STUDENT)
    trained = new.distiller.state_dict()
    write_tensors(out / PROJECTORS, {
        name.removeprefix("projectors."): t
        for name, t in trained.items()
        if name.startswith(("projectors.", "unit_projectors.", "objective."))
    })  # fmt: skip
    if new.fresh is not None:
        write_tensors(out / ADAPTERS, new.fresh.state_dict())
    # Without the place where it was made: a run may move.
    write_json(out / RUN, {**asdict(result), "run": ".", "student": STUDENT})


def open_images(cache: Cache, shards: str | Sequence[str] | None = None) -> AbstractContextManager[ImageFile | None]:
    """The cached images where they lie now; None if the cache holds the views. Raises ValueError as relocate."""
    return nullcontext() if cache.has_pixels else ImageFile(relocate(cache.index.images, shards))


def load_result(run: Path) -> DistillResult:
    """The result of a finished run. Raises ValueError if there is none at `run`."""
    return replace(read_as(run / RUN, DistillResult, "finished run"), run=run, student=run / STUDENT)
