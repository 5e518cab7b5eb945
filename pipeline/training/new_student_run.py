"""Make a student ready for the loop: on its device, with optimiser, moving average, checkpoint, log and trackers."""

from functools import partial
from pathlib import Path

from accelerate import Accelerator
from timm.utils import ModelEmaV3

from pipeline.config import Config, TrainingConfig
from pipeline.models.backbone import Backbone
from pipeline.outputs.folder import Mode
from pipeline.outputs.resuming import TRAINING_CHECKPOINT
from pipeline.runtime.compiling import Compilable
from pipeline.runtime.progress import say
from pipeline.training.best_epoch import Best, whole_states
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.fsdp import WholeModel, WholeOptimiser, apply_fsdp, uses_fsdp
from pipeline.training.learner import Learner
from pipeline.training.optimisers import new_optimiser
from pipeline.training.run_directory import LOG
from pipeline.training.run_log import RunLog
from pipeline.training.student_run import StudentRun
from pipeline.training.trackers import Tracking


def new_student_run(
    student: Backbone,
    learner: Learner,
    config: Config,
    settings: TrainingConfig,
    out: Path,
    holds_out: bool,
    mode: Mode,
    accelerator: Accelerator,
) -> StudentRun:
    """Return a student, and the learner that trains it at `out`, ready for its steps.

    config: the whole configuration, for trackers; settings: its section that trains; holds_out: whether images are
    held out; mode: "resume" restores the last checkpoint, if there is one.
    """
    split, main = uses_fsdp(accelerator), accelerator.is_main_process
    # One foreach operation cannot take both weights that FSDP split and plain buffers.
    ema = ModelEmaV3(student.model, settings.ema, foreach=not split) if settings.ema is not None else None
    average = ema.module if ema is not None else None
    model = accelerator.prepare_model(learner, evaluation_mode=split)  # evaluation mode means no DDP
    if split:
        kept, weights = apply_fsdp(learner, accelerator)
        if average is not None:
            apply_fsdp(average, accelerator)
        if main:
            say(f"{out}: each of {accelerator.num_processes} processes keeps about {kept:,} of {weights:,} weights")
    optimiser = new_optimiser(learner, settings, accelerator.device)
    read = partial(whole_states, student.model if average is None else average, learner)
    best = Best(settings, read) if holds_out else None
    parts = {
        "model": WholeModel(learner),
        "optimiser": WholeOptimiser(learner, optimiser),
        "scaler": accelerator.scaler,
        "ema": WholeModel(average) if average is not None else None,
        "best": best,
    }
    checkpoint = Checkpoint(out / TRAINING_CHECKPOINT, parts, settings.checkpoint_minutes)
    first = checkpoint.restore() if mode == "resume" else 0
    optimiser = accelerator.prepare_optimizer(optimiser)
    able = accelerator.device.type == "cuda" and not split
    step = Compilable(model, settings.compile, able, f"{settings.section}.compile")
    log = RunLog(out / LOG, first, main)
    tracking = Tracking(settings.trackers, out, config.model_dump(mode="json")) if main else None
    return StudentRun(
        settings=settings,
        student=student,
        model=step,
        optimiser=optimiser,
        checkpoint=checkpoint,
        log=log,
        tracking=tracking,
        first_step=first,
        ema=ema,
        learner=learner,
        best=best,
    )
