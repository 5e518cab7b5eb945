"""Build students with all they need, train them on one pass over a cache, and store them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor

from pipeline.config import Config
from pipeline.data import ImageFile
from pipeline.data.sampler import steps_per_epoch
from pipeline.runtime.progress import Meter, say
from pipeline.runtime.ranks import current
from pipeline.storage.outputs import INPUTS, Mode, write_json
from pipeline.storage.tensors import read_matrix, write_tensors
from pipeline.students.new import new_student
from pipeline.students.start import TeacherWeights, start_student
from pipeline.teachers.backbone import Backbone, save_backbone
from pipeline.teachers.own import Own, object_name
from pipeline.training.batch import BatchLoader
from pipeline.training.batch_norm import check_parts, synchronise
from pipeline.training.cached_teachers import CachedTeacher, Refiners, input_hashes
from pipeline.training.checkpoint import Checkpoint, RunLog
from pipeline.training.compiling import StepModel
from pipeline.training.distiller import Distiller, TeacherBranch
from pipeline.training.fsdp import WholeModel, WholeOptimiser, shard, wants_shards
from pipeline.training.held_out import HeldOut, split_images
from pipeline.training.joint_training import JointTraining, new_joint
from pipeline.training.run_directory import (
    ADAPTERS,
    CHECKPOINT,
    LOG,
    PROJECTORS_FILE,
    RUN,
    STUDENT,
    DistillResult,
    RefinerNote,
    TeacherLink,
    TeacherNote,
)
from pipeline.training.stored_refiners import load_refiner
from pipeline.training.student_run import StudentRun
from pipeline.training.targets import Targets
from pipeline.training.trackers import Tracking, check_trackers
from pipeline.training.trainer import train
from singer.backbones import depth
from singer.matching import match_blocks
from singer.refiner import Refiner

State = Mapping[str, Tensor]
# Besides vectors and biases, these never decay: CLS, register and mask tokens, position embeddings, and scales with
# more than one axis.
_NO_DECAY = ("*_token", "*_tokens", "*pos_embed", "*.position_embedding*", "*.gamma")


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

    def __post_init__(self) -> None:
        if self.module is not None:
            named = self.config.student.model_copy(update={"name": object_name(self.module)})
            object.__setattr__(self, "config", self.config.model_copy(update={"student": named}))


class NewStudent:
    """A student that is built with all it needs. Nothing has been written to its run directory yet."""

    def __init__(self, job: StudentSpec, sources: Sequence[CachedTeacher], accelerator: Accelerator) -> None:
        self.job, self.sources = job, sources
        settings, device = job.config.distill, accelerator.device
        refiners = [load_refiner(s.refiner, s.cache) if s.refiner is not None else None for s in sources]
        set_seed(settings.seed)
        size = sources[0].cache.manifest.teacher.image_size
        self.student: Backbone = new_student(job.config.student, size, job.module)
        t, loaded = sources[0].cache.manifest.teacher, sources[0].cache.teacher_config(job.config.teacher.weights)
        origin = TeacherWeights(loaded, t.architecture, t.model_args, t.weights)
        start_student(self.student, job.config.student, origin)
        synchronise(self.student.model, accelerator)
        if job.config.student.checkpointing:
            self.student.model.set_grad_checkpointing(True)
        check_trackers(settings.trackers)
        joint: JointTraining | None = None
        self.fresh: Refiner | None = None
        texts = read_matrix(settings.texts) if settings.texts is not None else None
        branches = []
        for source, refiner in zip(sources, refiners, strict=True):
            cache = source.cache
            matching = match_blocks(cache.blocks, cache.manifest.teacher.depth, depth(self.student.model))
            targets = Targets(cache, refiner, self.student, device, texts)
            if settings.joint:
                joint, self.fresh = new_joint(cache, job.config.refine, device)
            weight = settings.kd_weight * source.weight
            branches.append(
                TeacherBranch(
                    self.student, matching, targets, settings.objectives, self.fresh, joint, weight, source.name,
                    whole=settings.token_share == 1,
                )
            )  # fmt: skip
        self.distiller = Distiller(self.student, branches).to(device)
        if settings.token_share < 1:
            self.distiller.drop_patches()
        self.records, self.held_out = split_images(sources[0].cache, settings)
        self.count = len(sources[0].cache) if self.records is None else len(self.records)
        check_parts(self.student, self.distiller.blocks[-1], settings, self.count, accelerator)
        # One foreach operation cannot take both sharded weights and plain buffers.
        foreach = not wants_shards(accelerator)
        self.ema = ModelEmaV3(self.student.model, settings.ema, foreach=foreach) if settings.ema is not None else None

    @property
    def taught(self) -> list[TeacherLink]:
        """Return what the student learns from each teacher; the matching has only blocks that an objective reads."""
        found = []
        for source, branch in zip(self.sources, self.distiller.branches, strict=True):
            t, note = source.cache.manifest.teacher, source.note
            path = str(source.refiner) if source.refiner is not None else None
            teacher = TeacherNote(t.name, t.architecture, t.weights, t.image_size, t.class_token, t.variant)
            refiner = RefinerNote(note.cleaner, note.normaliser) if note is not None else None
            found.append(TeacherLink(source.cache.id, path, branch.matching, teacher, refiner, str(source.cache.place)))
        return found

    def matched(self) -> list[str]:
        """Return a line on the matched blocks for each teacher: 8 (192, 14 x 14) -> 2 (96, 8 x 8), ..."""

        def place(block: int, width: int, grid: tuple[int, int]) -> str:
            return f"{block} ({width}, {grid[0]} x {grid[1]})"

        lines = []
        for source, branch in zip(self.sources, self.distiller.branches, strict=True):
            t = source.cache.manifest.teacher
            pairs = [
                f"{place(b, t.width_of(b), t.grid_of(b))} -> {place(s, *branch.layout[s])}"
                for b, s in branch.matching.items()
            ]
            owner = f"of {source.name} " if len(self.sources) > 1 else ""
            lines.append(f"teacher block {owner}-> student block (width, grid): {', '.join(pairs)}")
        return lines

    def student_run(self, mode: Mode, accelerator: Accelerator) -> StudentRun:
        """Prepare the student for training; with mode "resume", restore its last checkpoint if it has one."""
        settings, out = self.job.config.distill, self.job.out
        sharded = wants_shards(accelerator)
        model = accelerator.prepare_model(self.distiller, evaluation_mode=sharded)  # evaluation mode means no DDP
        average = self.ema.module if self.ema is not None else None
        if sharded:
            kept, weights = shard(self.distiller, accelerator)
            if average is not None:
                shard(average, accelerator)
            if accelerator.is_main_process:
                say(f"{out}: each of {accelerator.num_processes} processes keeps about {kept:,} of {weights:,} weights")
        # One kernel for all weights, where there is one; on CPUs the default stays.
        fused = accelerator.device.type == "cuda" or None
        optimiser = torch.optim.AdamW(decay_groups(self.distiller, settings.weight_decay), fused=fused)
        parts = {
            "model": WholeModel(self.distiller),
            "optimiser": WholeOptimiser(self.distiller, optimiser),
            "scaler": accelerator.scaler,
            "ema": WholeModel(average) if average is not None else None,
        }
        checkpoint = Checkpoint(out / CHECKPOINT, parts, settings.checkpoint_minutes)
        first = checkpoint.restore() if mode == "resume" else 0
        optimiser = accelerator.prepare_optimizer(optimiser)
        compiles = accelerator.device.type == "cuda" and not sharded if settings.compile == "auto" else settings.compile
        log = RunLog(out / LOG, first, accelerator.is_main_process)
        tracking = (
            Tracking(settings.trackers, out, self.job.config.model_dump(mode="json"))
            if accelerator.is_main_process
            else None
        )
        step_model = StepModel(model, compiles, required=settings.compile is True)
        return StudentRun(
            settings, self.student, step_model, optimiser, checkpoint, log, tracking, first, self.ema, self.distiller
        )


def decay_groups(distiller: Distiller, weight_decay: float) -> list[dict[str, Any]]:
    """Group what is trained for an optimiser: weights that decay, and those that do not.

    Biases, norms, scales, tokens and position embeddings do not decay, nor do the weights that the student's
    architecture names.
    """
    named: Any = getattr(distiller.student, "no_weight_decay", set)
    exempt = {f"student.{name}" for name in named()} | set(_NO_DECAY)
    groups: list[dict[str, Any]] = param_groups_weight_decay(distiller, weight_decay, no_weight_decay_list=exempt)
    return groups


def run_jobs(
    made: Sequence[NewStudent],
    images: AbstractContextManager[ImageFile | None],
    mode: Mode,
    accelerator: Accelerator,
) -> dict[Path, DistillResult]:
    """Train and store students; return {run directory: result}.

    Call it after all checks, once the run directories are claimed (claimed_output).
    """
    for new in made if accelerator.is_main_process else ():
        write_json(new.job.out / INPUTS, input_hashes(new.sources))
        for line in new.matched():
            say(line)
        last, supervised = depth(new.student.model) - 1, new.distiller.blocks[-1]
        if supervised < last:
            say(f"note: nothing trains the student after block {supervised}; probes read its last block, {last}")
    ranks = current()
    ranks.wait()
    with ranks.together():
        student_runs = [new.student_run(mode, accelerator) for new in made]
    caches = [source.cache for source in made[0].sources]
    for new, student_run in zip(made, student_runs, strict=True):
        if student_run.first_step and accelerator.is_main_process:
            step, epochs = student_run.first_step, student_run.settings.epochs
            done = step / steps_per_epoch(new.count, student_run.settings.batch_size)
            say(f"{new.job.out} continues from step {step}: {done:.1f} of {epochs} epochs are done")
    with images as files:
        sizes = [new.student.image_size for new in made]
        load = BatchLoader(caches, files, sizes, made[0].records)
        apart = BatchLoader(caches, files, sizes, made[0].held_out)
        held_out = HeldOut(apart, made[0].job.config.distill) if len(apart) else None
        m = train(student_runs, load, accelerator, held_out)
    results = {}
    for new, student_run in zip(made, student_runs, strict=True):
        results[new.job.out] = result = describe(new, student_run, m)
        with ranks.together():
            student = WholeModel(new.student.model if new.ema is None else new.ema.module).state_dict()
            trained = WholeModel(new.distiller).state_dict()
        if accelerator.is_main_process:
            store(new, result, student, trained)
            student_run.checkpoint.path.unlink(missing_ok=True)
            if student_run.tracking is not None:
                student_run.tracking.close()
    return results


def describe(new: NewStudent, student_run: StudentRun, m: Meter) -> DistillResult:
    """Return the result of a trained student."""
    settings, job = new.job.config.distill, new.job
    first, *others = new.taught
    return DistillResult(
        **vars(first),
        others=others,
        run=job.out,
        student=job.out / STUDENT,
        parameters=sum(p.numel() for p in new.student.model.parameters()),
        steps=settings.epochs * steps_per_epoch(new.count, settings.batch_size),
        loss=student_run.loss,
        seconds=m.seconds,
        images_per_second=m.rate,
        data_wait_percent=m.wait_percent,
    )


def store(new: NewStudent, result: DistillResult, student: State, trained: State) -> None:
    """Store the student (its moving average, if there is one) and what was trained with it; write the result last."""
    out = new.job.out
    save_backbone(new.student, student, out / STUDENT)
    write_tensors(out / PROJECTORS_FILE, {
        name.removeprefix("projectors."): t
        for name, t in trained.items()
        if not name.startswith(("student.", "adapters."))
    })  # fmt: skip
    if new.fresh is not None:
        adapters = {n.removeprefix("adapters."): t for n, t in trained.items() if n.startswith("adapters.")}
        write_tensors(out / ADAPTERS, adapters)
    # The stored result has no absolute paths of the run, because a run directory may be moved.
    value = {**asdict(result), "run": ".", "student": STUDENT}
    if not result.others:
        del value["others"]
    write_json(out / RUN, value)
