"""Run the training loop of stage 3: students share one pass over a cache, and each has its own optimiser."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pipeline.config import DistillConfig
from pipeline.data.sampler import (
    WINDOW_BYTES,
    batch_index_lists,
    prefetch_depth,
    reads_windows,
    steps_per_epoch,
)
from pipeline.runtime.progress import Meter, meter, say
from pipeline.runtime.ranks import current
from pipeline.teachers.backbone import Backbone
from pipeline.training.batch import Batch, BatchLoader
from pipeline.training.checkpoint import Checkpoint, RunLog
from pipeline.training.trackers import Tracking
from singer.errors import UserError

_LOG_STEPS = 50


class StudentRun:
    """A student in training: its model (on its device, wrapped for several processes), optimiser, checkpoint and log.

    first_step: the step from which it continues; ema: the moving average of the student's weights, if any.
    """

    def __init__(
        self,
        settings: DistillConfig,
        student: Backbone,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        checkpoint: Checkpoint,
        log: RunLog,
        tracking: Tracking | None,
        first_step: int,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.settings, self.student, self.model, self.optimiser = settings, student, model, optimiser
        self.checkpoint, self.log, self.tracking = checkpoint, log, tracking
        self.first_step, self.ema = first_step, ema
        self.loss = 0.0
        self._sums: dict[str, Tensor] = {}
        self._since = 0

    def update(self, step: int, per_epoch: int, batch: Batch, accelerator: Accelerator) -> None:
        """Do one step of the optimiser."""
        # The random numbers of a model (drop path, dropout, masks) depend only on the step. A resumed run repeats them,
        # and a student that shares the pass with others draws the same as it would alone.
        torch.manual_seed(_step_seed(self.settings.seed, step, accelerator.process_index))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, step, per_epoch)
        self.optimiser.zero_grad(set_to_none=True)
        parts = list(batch.split(self.settings.accumulate))
        for number, part in enumerate(parts, start=1):
            with accelerator.no_sync(self.model) if number < len(parts) else nullcontext():
                losses = self.model(part)
                current().beat()
                accelerator.backward(torch.stack(list(losses.values())).sum())
            for name, loss in losses.items():
                self._sums[name] = self._sums.get(name, 0) + loss.detach()
        if self.settings.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update(self.student.model, step)
        self._since += 1

    def report(self, step: int, per_epoch: int, m: Meter, accelerator: Accelerator) -> None:
        """Log the mean losses since the last report. Raises UserError if their sum is not finite."""
        parts = {name: float(v) / self._since for name, v in _mean(self._sums, accelerator).items()}
        self.loss = sum(parts.values())
        if not math.isfinite(self.loss):
            raise UserError(f"the loss is {self.loss} at step {step + 1}; lower distill.lr or use precision no")
        figures = {
            "epoch": (step + 1) / per_epoch,
            "lr": learning_rate(self.settings, step, per_epoch),
            "loss": self.loss,
            "images_per_second": m.rate,
            "data_wait_percent": m.wait_percent,
        }
        self.log.write(step=step + 1, **figures, parts=parts)
        if self.tracking is not None:
            self.tracking.log(step + 1, figures | {f"loss/{name}": value for name, value in parts.items()})
        self._sums, self._since = {}, 0


def train(student_runs: Sequence[StudentRun], load: BatchLoader, accelerator: Accelerator) -> Meter:
    """Train students from the earliest of their first steps to the end of the last epoch.

    All of them see the records in the same order. Return the meter of the pass.
    """
    settings, records = student_runs[0].settings, len(load)
    per_epoch = steps_per_epoch(records, settings.batch_size)
    total = settings.epochs * per_epoch
    first = min(t.first_step for t in student_runs)

    def seen(step: int) -> int:
        """Return the number of records on which all processes have trained before `step`."""
        epoch, within = divmod(step, per_epoch)
        return epoch * records + min(records, within * settings.batch_size)

    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log_every = min(_LOG_STEPS, max(1, per_epoch // 4))
    ranks = current()
    for student_run in student_runs:
        student_run.model.train()
    if main and settings.read_block > 1 and not reads_windows(settings, load.record_bytes):
        few = WINDOW_BYTES // load.record_bytes
        say(
            f"note: shuffle windows of {settings.shuffle_window} records are too large to be read in one piece, "
            f"which is faster; the largest such window is distill.shuffle_window={few}"
        )
    lists = batch_index_lists(records, load.record_bytes, settings, rank, world, first, total)
    ahead = prefetch_depth(settings, load.record_bytes, world)
    with (
        meter("distill", settings.epochs * records, "images", quiet=not main, done=seen(first)) as m,
        closing(load(lists, settings.workers, m, ahead)) as batches,
    ):
        for step, stored in enumerate(batches, start=first):
            going = [t for t in student_runs if t.first_step <= step]
            moved = stored.to(accelerator.device, load.caches, [t.student for t in going])
            for student_run, batch in zip(going, moved, strict=True):
                with ranks.together():
                    student_run.update(step, per_epoch, batch, accelerator)
            m.advance(seen(step + 1) - seen(step), _note(going))
            ranks.step(f"step {step + 1}")

            epoch_ends = (step + 1) % per_epoch == 0
            if (step + 1) % log_every == 0 or epoch_ends:
                for student_run in going:
                    student_run.report(step, per_epoch, m, accelerator)
                    # A checkpoint is only saved here, where all running sums are empty and need not be stored.
                    if step + 1 < total and (epoch_ends or _agreed(student_run.checkpoint.due, accelerator)):
                        with ranks.together(), ranks.slow():
                            student_run.checkpoint.save(step + 1, write=main)
                        ranks.wait()  # the first process writes the file
    return m


def _agreed(due: bool, accelerator: Accelerator) -> bool:
    """Return what the first process decides by its clock, because all processes must gather the state together."""
    with current().together():
        return bool(broadcast(torch.tensor(due, device=accelerator.device)))


def _mean(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the means of some sums over all processes."""
    with current().together():
        found: dict[str, Tensor] = accelerator.reduce(sums, "mean")
        return found


def _note(student_runs: Sequence[StudentRun]) -> str:
    losses = [f"{t.loss:.4f}" for t in student_runs if t.loss]
    return f"loss {', '.join(losses)}" if losses else ""


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "little")


def learning_rate(settings: DistillConfig, step: int, per_epoch: int) -> float:
    """Return the learning rate: a linear warm-up over warmup_epochs, then half a cosine to final_lr · lr at the end."""
    warm = settings.warmup_epochs * per_epoch
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, settings.epochs * per_epoch - 1 - warm)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
