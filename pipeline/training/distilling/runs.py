"""Build students with all they need, train them on one pass over a cache, and store them."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from pipeline.config import Config, DistillConfig
from pipeline.data import ImageFile
from pipeline.data.sampler import WINDOW_BYTES, shuffle_of
from pipeline.models.backbone import Backbone, save_backbone
from pipeline.models.fetching import first_line
from pipeline.models.names import OWN
from pipeline.models.own import Own
from pipeline.outputs.folder import Mode
from pipeline.outputs.provenance import INPUTS
from pipeline.outputs.resuming import STUDENT_FOLDER, TRAINING_CHECKPOINT
from pipeline.runtime.progress import Meter, say
from pipeline.runtime.ranks import current
from pipeline.storage.json_files import write_json
from pipeline.storage.tensors import write_tensors
from pipeline.students.start import start_student, starts_as_blocks
from pipeline.training.batch import BatchLoader
from pipeline.training.batch_norm import check_parts, synchronise
from pipeline.training.best_epoch import State
from pipeline.training.distilling.cached_teachers import CachedTeacher, Refiners, cached_weights, input_hashes
from pipeline.training.distilling.new_distiller import new_distiller, student_of, teach_cls
from pipeline.training.distilling.subset import Split, split_images
from pipeline.training.new_student_run import new_student_run
from pipeline.training.refining.stored_refiners import load_refiner
from pipeline.training.run_directory import (
    ADAPTERS,
    PROJECTORS_FILE,
    DistillResult,
    TeacherLink,
    TeacherNote,
    write_result,
)
from pipeline.training.schedule import layer_decay
from pipeline.training.student_run import StudentRun
from pipeline.training.trackers import check_trackers
from pipeline.training.trainer import train
from singer.backbones import count_parameters, depth
from singer.errors import UserError
from singer.sizes import Size


@dataclass(frozen=True)
class StudentSpec:
    """A student to train: its configuration, its run directory, and the refiner of its targets, if any.

    refiner: for several caches, a list with one for each, or None for all. module: a module of your own, with its
    description, which is trained in place of what the section student names.
    """

    config: Config
    out: Path
    refiner: Refiners = None
    module: Own | None = None


class NewStudent:
    """A student that is built with all it needs. Nothing has been written to its run directory yet.

    split: the images of the pass, if it has several students, which share them; mode: "resume" takes the weights from
    the checkpoint, if there is one.
    """

    def __init__(
        self,
        spec: StudentSpec,
        teachers: Sequence[CachedTeacher],
        accelerator: Accelerator,
        split: Split | None = None,
        mode: Mode = "new",
    ) -> None:
        self.spec, self.teachers = spec, teachers
        settings, device = spec.config.distill, accelerator.device
        refiners = [load_refiner(t.refiner, t.cache) if t.refiner is not None else None for t in teachers]
        set_seed(settings.seed)
        self.student = self._started(mode == "resume" and (spec.out / TRAINING_CHECKPOINT).exists())
        self.layer_decay = self._layer_decay()
        synchronise(self.student.model, accelerator)
        check_trackers(settings)
        self.parameters = count_parameters(self.student.model)
        self.distiller, self.others = new_distiller(self.student, spec.config, teachers, device, refiners)
        self.records, self.held_out = split or split_images(teachers[0].cache, settings)
        self.count = len(teachers[0].cache) if self.records is None else len(self.records)
        check_parts(self.student, self.distiller.blocks[-1], settings, self.count, accelerator.num_processes)
        if settings.ema is not None and self.student.architecture.startswith(OWN):
            _check_copies(self.student)

    def _started(self, continues: bool) -> Backbone:
        """Build the student, and start it as student.init says, at first from the first teacher.

        continues: whether the weights come from a checkpoint, so that those of the start, which may be gone, are not
        read.
        """
        config, cache = self.spec.config, self.teachers[0].cache
        wanted = config.student.model_copy(update={"pretrained": False}) if continues else config.student
        student = student_of(wanted, self.teachers, self.spec.module)
        if not continues:
            start_student(student, config.student, cached_weights(cache, config.teacher.weights))
        return student

    def _layer_decay(self) -> float:
        """Return distill.layer_decay; its rule is for students whose weights are all trained."""
        config, model = self.spec.config, self.student.model
        may = config.distill.trained is None and config.student.lora is None and hasattr(model, "group_matcher")
        teacher = cached_weights(self.teachers[0].cache, config.teacher.weights)
        whole = may and starts_as_blocks(self.student, config.student, teacher)
        return layer_decay(config.distill, depth(model), whole)

    @property
    def teacher_links(self) -> list[TeacherLink]:
        """Return what the student learns from each teacher; the matching has only blocks that an objective reads."""
        found = []
        for teacher, branch in zip(self.teachers, self.distiller.branches, strict=True):
            cache, manifest = teacher.cache, teacher.refiner_manifest
            t, kind = cache.manifest.teacher, manifest.kind if manifest is not None else None
            path = str(teacher.refiner) if teacher.refiner is not None else None
            described = TeacherNote(t.name, t.architecture, t.weights, t.image_size, t.class_token, t.variant)
            found.append(TeacherLink(described, cache.id, str(cache.place), branch.links, path, kind))
        return found

    def matched(self) -> list[str]:
        """Return a line on the matched blocks for each teacher, 8 (192, 14 x 14) -> 2 (96, 8 x 8), ..., and more."""

        def place(block: int, width: int, grid: tuple[int, int]) -> str:
            return f"{block} ({width}, {grid[0]} x {grid[1]})"

        lines = []
        for teacher, branch in zip(self.teachers, self.distiller.branches, strict=True):
            t = teacher.cache.manifest.teacher
            pairs = [
                f"{place(b, t.width_of(b), t.grid_of(b))} -> {place(s, *branch.layout[s])}"
                for b, s in branch.links.items()
            ]
            owner = f"of {teacher.name} " if len(self.teachers) > 1 else ""
            lines.append(f"teacher block {owner}-> student block (width, grid): {', '.join(pairs)}")
            if branch.matching:
                lines.append(f"projector {owner}(distill.projector): {branch.projector}")
        if self.spec.config.student.lora is not None:
            trained = sum(p.numel() for p in self.student.model.parameters() if p.requires_grad)
            lines.append(f"student.lora: {trained:,} weights are trained of a student that has {self.parameters:,}")
        if self.layer_decay < 1 and self.spec.config.distill.layer_decay == "auto":
            lines.append(
                f"the learning rate falls to {self.layer_decay:.3g} of itself from each block to the one before it, so "
                "that the student keeps more of its start (distill.layer_decay)"
            )
        share = self.distiller.share
        if share < 1:
            first = f"in the first {100 * (1 - self.spec.config.distill.whole_share):g} % of the steps"
            lines.append(f"the student sees {100 * share:g} % of its patches {first} (distill.token_share)")
        return lines

    def student_run(self, mode: Mode, accelerator: Accelerator) -> StudentRun:
        """Prepare the student for training; with mode "resume", restore its last checkpoint if it has one."""
        config, holds_out = self.spec.config, len(self.held_out) > 0
        settings = config.distill.model_copy(update={"layer_decay": self.layer_decay})
        return new_student_run(
            self.student, self.distiller, config, settings, self.spec.out, holds_out, mode, accelerator
        )


def _check_copies(student: Backbone) -> None:
    """Raise UserError if a module of the user's own cannot be copied, which a moving average needs."""
    try:
        copy.deepcopy(student.model)
    except Exception as error:  # modules hold what they like
        raise UserError(
            f"distill.ema: a {student.architecture.removeprefix(OWN)} cannot be copied ({first_line(error)}); "
            "set it to null"
        ) from None


def train_students(
    made: Sequence[NewStudent],
    images: AbstractContextManager[ImageFile | None],
    mode: Mode,
    accelerator: Accelerator,
) -> dict[Path, DistillResult]:
    """Train and store students; return {run directory: result}.

    Call it after all checks, once the run directories are claimed (claimed_output).
    """
    for new in made if accelerator.is_main_process else ():
        write_json(new.spec.out / INPUTS, input_hashes(new.teachers, new.spec.config.distill.share_run))
        for line in new.matched():
            say(line)
        last, supervised = depth(new.student.model) - 1, new.distiller.blocks[-1]
        if supervised < last:
            say(f"note: nothing trains the student after block {supervised}; probes read its last block, {last}")
        if new.student.has_cls and not teach_cls(new.teachers):
            say(
                "note: the teacher has no CLS token, so the student's has no target; use the patch tokens, or take a "
                "student without CLS, such as vit or vit_srelpos_small_patch16_224"
            )
        cache, size = new.teachers[0].cache, new.student.image_size
        if (small := cache.smaller_views(size)) is not None:
            say(
                f"note: the views of {small} pixels in {cache.place} are enlarged to the student's {Size.of(size)}; to "
                "show it more, cache again with views.pixels=none or a larger views.pixel_size"
            )
    ranks = current()
    ranks.wait()
    with ranks.together():
        student_runs = [new.student_run(mode, accelerator) for new in made]
    caches = [teacher.cache for teacher in made[0].teachers]
    with images as files:
        sizes = [new.student.image_size for new in made]
        load = BatchLoader(caches, files, sizes, made[0].records, made[0].others)
        if accelerator.is_main_process:
            advise_window(made[0].spec.config.distill, load)
        apart = BatchLoader(caches, files, sizes, made[0].held_out)
        m = train(student_runs, load, apart, accelerator)
    results = {}
    for new, student_run in zip(made, student_runs, strict=True):
        results[new.spec.out] = result = result_of(new, student_run, m)
        student_run.finish(partial(store, new, result), accelerator.is_main_process)
    return results


def advise_window(settings: DistillConfig, load: BatchLoader) -> None:
    """Say so if shuffle windows are too large to be read in one piece."""
    shuffle = shuffle_of(settings, len(load), load.record_bytes)
    few = WINDOW_BYTES // load.record_bytes
    if 1 < shuffle.block <= few and not shuffle.whole:
        say(
            f"note: shuffle windows of {shuffle.window} records are too large to be read in one piece, which is "
            f"faster; the largest such window is distill.shuffle_window={few}"
        )


def result_of(new: NewStudent, student_run: StudentRun, m: Meter) -> DistillResult:
    """Return the result of a trained student."""
    spec = new.spec
    return DistillResult(
        run=spec.out,
        student=spec.out / STUDENT_FOLDER,
        teachers=new.teacher_links,
        parameters=new.parameters,
        steps=student_run.steps,
        loss=student_run.loss,
        seconds=m.seconds,
        images_per_second=m.rate,
        data_wait_percent=m.wait_percent,
        kept_epoch=student_run.kept_epoch,
    )


def store(new: NewStudent, result: DistillResult, student: State, trained: State) -> None:
    """Store the student (its moving average, if there is one) and what was trained with it; write the result last."""
    out = new.spec.out
    save_backbone(new.student, student, out / STUDENT_FOLDER)
    write_tensors(out / PROJECTORS_FILE, {
        name.removeprefix("projectors."): t
        for name, t in trained.items()
        if not name.startswith("adapters.")
    })  # fmt: skip
    if new.spec.config.distill.joint:
        adapters = {n.removeprefix("adapters."): t for n, t in trained.items() if n.startswith("adapters.")}
        write_tensors(out / ADAPTERS, adapters)
    write_result(result)
