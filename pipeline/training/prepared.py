"""Prepare a student for the loop: on its device, with optimiser, moving average, checkpoint, log and trackers."""

from pathlib import Path

from accelerate import Accelerator
from timm.utils import ModelEmaV3

from pipeline.config import Config, TrainingConfig
from pipeline.data.sampler import steps_per_epoch
from pipeline.models.backbone import Backbone
from pipeline.outputs.folder import Mode
from pipeline.runtime.compiling import Compilable
from pipeline.runtime.progress import say
from pipeline.training.best_epoch import Best, State
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.fsdp import WholeModel, WholeOptimiser, apply_fsdp, uses_fsdp
from pipeline.training.learner import Learner
from pipeline.training.optimisers import new_optimiser
from pipeline.training.run_directory import CHECKPOINT, LOG
from pipeline.training.run_log import RunLog
from pipeline.training.student_run import StudentRun
from pipeline.training.trackers import Tracking


def say_continued(student_run: StudentRun, out: Path, records: int) -> None:
    """Say from where a run continues that was interrupted. records: those that it is trained on."""
    settings, step = student_run.settings, student_run.first_step
    if step:
        done = step / steps_per_epoch(records, settings.batch_size)
        say(f"{out} continues from step {step}: {done:.1f} of {settings.epochs} epochs are done")


class Prepared:
    """A student, and the learner that trains it, at `out`; nothing has been written there yet.

    config: the whole configuration, for trackers; settings: its section that trains; holds_out: whether images are
    held out.
    """

    def __init__(
        self,
        student: Backbone,
        learner: Learner,
        config: Config,
        settings: TrainingConfig,
        out: Path,
        holds_out: bool,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.learner, self.config, self.settings = student, learner, config, settings
        self.out, self.holds_out = out, holds_out
        # One foreach operation cannot take both weights that FSDP split and plain buffers.
        foreach = not uses_fsdp(accelerator)
        self.ema = ModelEmaV3(student.model, settings.ema, foreach=foreach) if settings.ema is not None else None

    def run(self, mode: Mode, accelerator: Accelerator) -> StudentRun:
        """Return the student ready for its steps; with mode "resume", restore its last checkpoint if it has one."""
        settings, out = self.settings, self.out
        split = uses_fsdp(accelerator)
        model = accelerator.prepare_model(self.learner, evaluation_mode=split)  # evaluation mode means no DDP
        average = self.ema.module if self.ema is not None else None
        if split:
            kept, weights = apply_fsdp(self.learner, accelerator)
            if average is not None:
                apply_fsdp(average, accelerator)
            if accelerator.is_main_process:
                say(f"{out}: each of {accelerator.num_processes} processes keeps about {kept:,} of {weights:,} weights")
        optimiser = new_optimiser(self.learner, settings, accelerator.device)
        best = Best(settings, self.states) if self.holds_out else None
        parts = {
            "model": WholeModel(self.learner),
            "optimiser": WholeOptimiser(self.learner, optimiser),
            "scaler": accelerator.scaler,
            "ema": WholeModel(average) if average is not None else None,
            "best": best,
        }
        checkpoint = Checkpoint(out / CHECKPOINT, parts, settings.checkpoint_minutes)
        first = checkpoint.restore() if mode == "resume" else 0
        optimiser = accelerator.prepare_optimizer(optimiser)
        able = accelerator.device.type == "cuda" and not split
        step = Compilable(model, settings.compile, able, f"{settings.section}.compile")
        log = RunLog(out / LOG, first, accelerator.is_main_process)
        tracking = (
            Tracking(settings.trackers, out, self.config.model_dump(mode="json"))
            if accelerator.is_main_process
            else None
        )
        return StudentRun(
            settings, self.student, step, optimiser, checkpoint, log, tracking, first, self.ema, self.learner, best
        )

    def states(self) -> tuple[State, State]:
        """Return the states of the student (its moving average, if there is one) and of what is trained with it."""
        student = WholeModel(self.student.model if self.ema is None else self.ema.module).state_dict()
        whole = WholeModel(self.learner).state_dict()
        return student, {name: x for name, x in whole.items() if not name.startswith("student.")}
