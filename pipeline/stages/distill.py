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

from pipeline.checks import check_names, files_of_training
from pipeline.config import Config, DistillConfig, keys
from pipeline.data import Spec, places_of
from pipeline.models.own import Own, object_name
from pipeline.outputs.folder import Mode, begun_inputs, check_output, claimed_output
from pipeline.outputs.provenance import check_inputs
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.outputs.stage_log import process_log
from pipeline.runtime.devices import make_accelerator, own_settings, with_precision
from pipeline.runtime.watched_rank import watched
from pipeline.training.distilling.cached_teachers import (
    CachedTeacher,
    Places,
    Refiners,
    as_places,
    input_hashes,
    open_images,
    open_teachers,
)
from pipeline.training.distilling.runs import NewStudent, StudentSpec, train_students
from pipeline.training.distilling.subset import split_images
from pipeline.training.fsdp import check_fsdp
from pipeline.training.run_directory import STAGE, DistillResult, resumed_result
from singer.errors import UserError
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


@own_settings()
def fan_out(
    specs: Sequence[StudentSpec], caches: Places, images: Spec | None = None, mode: Mode = "new"
) -> list[DistillResult]:
    """Train several students on one pass over the cache, each as it would be trained alone.

    Raises UserError for mistakes that the user can fix, and if a key in SHARED differs between the students.
    """
    check_shared(specs)
    specs = [replace(spec, config=_resolved(spec)) for spec in specs]
    settings = specs[0].config.distill
    check_fsdp(settings.precision)
    begun = [begun_inputs(spec.out, mode) for spec in specs]
    teachers_of_each = [
        open_teachers(spec.config.distill, caches, spec.refiner, known)
        for spec, known in zip(specs, begun, strict=True)
    ]
    _check_same_blocks(specs, teachers_of_each)
    results: dict[Path, DistillResult] = {}
    for spec, teachers, known in zip(specs, teachers_of_each, begun, strict=True):
        check_spec(spec, teachers)
        refiners = [teacher.refiner for teacher in teachers if teacher.refiner is not None]
        images_at = places_of(teachers[0].cache.index.images)
        read = [*as_places(caches), *refiners, *images_at, *files_of_training(spec.config)]
        check_output(spec.out, mode, STAGE, spec.config, read)
        if known is not None:
            check_inputs(spec.out, input_hashes(teachers, settings.share_run))
            if (spec.out / RUN_RESULT).exists():
                results[spec.out] = resumed_result(spec.out)
    cache = teachers_of_each[0][0].cache
    files = open_images(cache, images)
    accelerator = make_accelerator(settings.precision)
    main = accelerator.is_main_process
    with watched(accelerator, STAGE), ExitStack() as claims:
        split = split_images(cache, settings, images) if len(results) < len(specs) else None
        made = [
            NewStudent(spec, teachers, accelerator, split, mode)
            for spec, teachers in zip(specs, teachers_of_each, strict=True)
            if spec.out not in results
        ]
        for new in made:
            claim = claimed_output(new.spec.out, mode, STAGE, new.spec.config, settings.seed)
            claims.enter_context(claim if main else process_log(new.spec.out))
        if made:
            results |= train_students(made, files, mode, accelerator)
    return [results[spec.out] for spec in specs]


def _resolved(spec: StudentSpec) -> Config:
    """Return a student's configuration with its precision on this machine, and the name of a module of one's own."""
    config = with_precision(spec.config)
    return config if spec.module is None else config.changed(student={"name": object_name(spec.module)})


def check_shared(specs: Sequence[StudentSpec]) -> None:
    """Raise UserError if the students cannot train on one pass, or one of them cannot train at all."""
    first, *others = specs
    if others and first.config.distill.precision == "fp16":
        raise UserError("students of one pass would share fp16's loss scale; train them one by one, or in bf16")
    for spec in specs:
        settings = spec.config.distill
        check_names(spec.config, "distill")
        for name in settings.objectives:
            if OBJECTIVES[name].needs_all_patches and settings.token_share not in (None, 1):
                raise UserError(
                    f"distill.objective {name} needs all patches of an image, and the student sees a share of them; "
                    "set distill.token_share=1"
                )
    for spec in others:
        for key in SHARED:
            ours, theirs = (getattr(s.config.distill, key) for s in (first, spec))
            if ours != theirs:
                raise UserError(
                    f"{first.out} and {spec.out} cannot train on one pass: distill.{key} is {ours} and {theirs}"
                )
    if len({spec.out for spec in specs}) < len(specs):
        raise UserError("two students of one pass cannot have the same output folder")


def _check_same_blocks(specs: Sequence[StudentSpec], teachers_of_each: Sequence[Sequence[CachedTeacher]]) -> None:
    """Raise UserError if students of one pass would learn from different blocks."""
    read = [[(t.cache.manifest.id(), t.cache.blocks) for t in teachers] for teachers in teachers_of_each]
    for spec, blocks in zip(specs, read, strict=True):
        if blocks != read[0]:
            raise UserError(f"{specs[0].out} and {spec.out} cannot train on one pass: they learn from different blocks")


def check_spec(spec: StudentSpec, teachers: Sequence[CachedTeacher]) -> None:
    """Raise UserError if the student's settings do not fit these teachers."""
    spec.config.distill.objectives_of(len(teachers))
    for teacher in teachers:
        spec.config.distill.weights_of(teacher.cache.blocks)
    if spec.config.distill.joint and any(t.refiner is not None for t in teachers):
        raise UserError("distill.joint trains its own adapters; leave out --refiner or distill.joint")
    if spec.config.distill.joint and len(teachers) > 1:
        raise UserError("distill.joint is for one teacher; refine each cache first and give its --refiner")
