"""Stage 3: train students on frozen refined targets, which are computed from the cached features in each step.

Run it with `singer distill --cache CACHE --refiner REFINER --out RUN`, or with `accelerate launch cli.py distill ...`
on several processes. Without a refiner, the targets are the raw features; this is the FitNet baseline. The stage reads
only the cache and the images.

Several caches of the same images and views are several teachers: a student has projectors and an objective for each,
and minimises the weighted sum of the objectives. Several students that share the data train on one pass over it
(`fan_out`), each as it would alone.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config, DistillConfig, keys
from pipeline.data import Spec, places_of
from pipeline.models.own import Own
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.outputs.provenance import INPUTS, check_inputs
from pipeline.outputs.resuming import RUN_RESULT, TRAINING_CHECKPOINT
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import make_accelerator, with_precision
from pipeline.runtime.watched_rank import watched
from pipeline.storage.json_files import read_as
from pipeline.training.cached_teachers import (
    CachedTeacher,
    Places,
    Refiners,
    as_places,
    input_hashes,
    open_images,
    open_teachers,
)
from pipeline.training.fsdp import check_fsdp
from pipeline.training.run_directory import STAGE, DistillResult, load_result
from pipeline.training.runs import NewStudent, StudentSpec, run_jobs
from pipeline.training.subset import split_images
from singer.errors import UserError, require_known
from singer.objectives import OBJECTIVES

# The keys that must be equal for all students of one pass.
SHARED = [name for name, about in keys(DistillConfig) if about.shared]


def distill(
    config: Config,
    caches: Places,
    out: Path,
    refiner: Refiners = None,
    images: Spec | None = None,
    mode: Mode = "new",
    student: Own | None = None,
) -> DistillResult:
    """Train a student and store it at `out`.

    caches: one cache, or a list for several teachers, with a list of refiners in the same order; images: where the
    cached images are, if they moved after they were cached; student: a module of your own with its description, in
    place of student.name. Raises UserError for mistakes that the user can fix.
    """
    return fan_out([StudentSpec(config, out, refiner, student)], caches, images, mode)[0]


def fan_out(
    jobs: Sequence[StudentSpec], caches: Places, images: Spec | None = None, mode: Mode = "new"
) -> list[DistillResult]:
    """Train several students on one pass over the cache, each as it would be trained alone.

    Raises UserError for mistakes that the user can fix, and if a key in SHARED differs between the jobs.
    """
    check_shared(jobs)
    jobs = [replace(job, config=with_precision(job.config)) for job in jobs]
    settings = jobs[0].config.distill
    check_fsdp(settings.precision)
    teachers_of_jobs = [open_teachers(job.config.distill, caches, job.refiner, _begun(job.out, mode)) for job in jobs]
    first, *others = ([(t.cache.manifest.id(), t.cache.blocks) for t in teachers] for teachers in teachers_of_jobs)
    for job, other in zip(jobs[1:], others, strict=True):
        if other != first:
            raise UserError(f"{jobs[0].out} and {job.out} cannot train on one pass: they learn from different blocks")
    results: dict[Path, DistillResult] = {}
    for job, teachers in zip(jobs, teachers_of_jobs, strict=True):
        check_job(job, teachers)
        own = (job.config.student.starts_from, job.config.teacher.weights, settings.share_run, settings.texts)
        read = [
            *as_places(caches),
            *(place for place in (*own, *(t.refiner for t in teachers)) if place is not None),
            *places_of(teachers[0].cache.index.images),
        ]
        check_output(job.out, mode, STAGE, job.config, read)
        if mode == "resume" and (job.out / INPUTS).exists():
            check_inputs(job.out, input_hashes(teachers, settings.share_run))
            if (job.out / RUN_RESULT).exists():
                results[job.out] = load_result(job.out)
                (job.out / TRAINING_CHECKPOINT).unlink(missing_ok=True)
    files = open_images(teachers_of_jobs[0][0].cache, images)
    accelerator = make_accelerator(settings.precision)
    main = accelerator.is_main_process
    with watched(accelerator, STAGE), ExitStack() as claims:
        split = split_images(teachers_of_jobs[0][0].cache, settings, images) if len(results) < len(jobs) else None
        made = [
            NewStudent(job, teachers, accelerator, split, mode)
            for job, teachers in zip(jobs, teachers_of_jobs, strict=True)
            if job.out not in results
        ]
        for new in made:
            claim = claimed_output(new.job.out, mode, STAGE, new.job.config, settings.seed)
            claims.enter_context(claim if main else process_log(new.job.out))
        if made:
            results |= run_jobs(made, files, mode, accelerator)
    return [results[job.out] for job in jobs]


def _begun(out: Path, mode: Mode) -> dict[str, str | None] | None:
    """Return the inputs of a run that is continued, or None for a new run."""
    continued = mode == "resume" and (out / INPUTS).exists()
    return read_as(out / INPUTS, dict[str, str | None], "run") if continued else None


def check_shared(jobs: Sequence[StudentSpec]) -> None:
    """Raise UserError if the jobs cannot train on one pass, or one of them cannot train at all."""
    first, *others = jobs
    if others and first.config.distill.precision == "fp16":
        raise UserError("students of one pass would share fp16's loss scale; train them one by one, or in bf16")
    for job in jobs:
        settings = job.config.distill
        for name in settings.objectives:
            require_known("distill.objective", name, OBJECTIVES)
    for job in others:
        for key in SHARED:
            ours, theirs = (getattr(j.config.distill, key) for j in (first, job))
            if ours != theirs:
                raise UserError(
                    f"{first.out} and {job.out} cannot train on one pass: distill.{key} is {ours} and {theirs}"
                )
    if len({job.out for job in jobs}) < len(jobs):
        raise UserError("two students of one pass cannot have the same output folder")


def check_job(job: StudentSpec, teachers: Sequence[CachedTeacher]) -> None:
    """Raise UserError if the job's settings do not fit these teachers."""
    job.config.distill.objectives_of(len(teachers))
    for teacher in teachers:
        job.config.distill.weights_of(teacher.cache.blocks)
    if job.config.distill.joint and any(t.refiner is not None for t in teachers):
        raise UserError("distill.joint trains its own adapters; leave out --refiner or distill.joint")
    if job.config.distill.joint and len(teachers) > 1:
        raise UserError("distill.joint is for one teacher; refine each cache first and give its --refiner")
