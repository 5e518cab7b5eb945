"""Run the training loop: students share one pass over the data, and each has its own optimiser."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from pipeline.data.sampler import batch_index_lists, prefetch_depth, steps_per_epoch
from pipeline.runtime.progress import Meter, meter, say
from pipeline.runtime.ranks import current
from pipeline.training.batch import Loader
from pipeline.training.held_out import measure
from pipeline.training.student_run import StudentRun
from pipeline.training.to_device import StartedSteps, on_device

_LOG_STEPS = 50
# A first step can spoil a good start, such as a head that is a linear probe, and few more do not repair it.
_FEW_STEPS = 100


def train(student_runs: Sequence[StudentRun], load: Loader, held_out: Loader, accelerator: Accelerator) -> Meter:
    """Train students from the earliest of their first steps to the end of the last epoch.

    All of them see the records in the same order. held_out: the records, if any, that they are measured on after every
    epoch. Return the meter of the pass.
    """
    settings, records = student_runs[0].settings, len(load)
    per_epoch = steps_per_epoch(records, settings.batch_size)
    total = settings.epochs * per_epoch
    # What a run that ended early would still have done is left out.
    first = min((t.first_step for t in student_runs if not t.ended), default=total)

    def seen(step: int) -> int:
        """Return the number of records on which all processes have trained before `step`."""
        epoch, within = divmod(step, per_epoch)
        return epoch * records + min(records, within * settings.batch_size)

    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log_every = min(_LOG_STEPS, max(1, per_epoch // 4))
    ranks = current()
    if main and total < _FEW_STEPS:
        steps = f"{total} step{'' if total == 1 else 's'}"
        say(
            f"note: {steps} of training may teach little, and spoil a good start; give more epochs (--epochs), or "
            "smaller batches (--batch-size)"
        )
    for student_run in student_runs:
        if student_run.first_step and main:
            _say_continued(student_run, per_epoch)
        student_run.model.plain.train()
    lists = batch_index_lists(records, load.record_bytes, settings, rank, world, first, total)
    ahead = prefetch_depth(settings, records, load.record_bytes, world)
    started, images = StartedSteps(), settings.epochs * records
    with (
        meter(settings.section, images, "images", quiet=not main, done=seen(first), busy=started.busy) as m,
        closing(load(lists, settings.workers, m, ahead)) as batches,
    ):
        for step, batch in enumerate(on_device(batches, accelerator.device, started), start=first):
            going = [t for t in student_runs if t.first_step <= step and not t.ended]
            if len(going) > 1:
                batch = going[0].learner.decoded(batch)  # once for all of them
            for student_run in going:
                with ranks.together():
                    student_run.update(batch, per_epoch, accelerator)
            m.advance(seen(step + 1) - seen(step), _note(going))
            ranks.step(f"step {step + 1}")

            epoch_ends = (step + 1) % per_epoch == 0
            if (step + 1) % log_every == 0 or epoch_ends:
                figures: Sequence[Mapping[str, Any] | None] = [None] * len(going)
                if len(held_out) and epoch_ends:
                    figures = measure(held_out, going, accelerator.device)
                for student_run, measured in zip(going, figures, strict=True):
                    _end_interval(student_run, step + 1, per_epoch, m, accelerator, measured)
                if all(t.ended for t in student_runs):
                    break
        for student_run in student_runs:
            student_run.finish_report()
    return m


def _say_continued(student_run: StudentRun, per_epoch: int) -> None:
    """Say from where a run continues that was interrupted."""
    out, step, epochs = student_run.checkpoint.path.parent, student_run.first_step, student_run.settings.epochs
    say(f"{out} continues from step {step}: {step / per_epoch:.1f} of {epochs} epochs are done")


def _end_interval(
    student_run: StudentRun,
    done: int,
    per_epoch: int,
    m: Meter,
    accelerator: Accelerator,
    measured: Mapping[str, Any] | None,
) -> None:
    """Report the interval that ends after `done` steps, and save a checkpoint if one is due; all processes call it.

    measured: after an epoch, the figures of held-out images, if there are any, see held_out.measure.
    """
    epoch, within = divmod(done, per_epoch)
    epochs, ranks, main = student_run.settings.epochs, current(), accelerator.is_main_process
    best = student_run.best
    if measured is not None and best is not None:
        loss = _of_first(float(measured["held_out_loss"]), accelerator)
        with ranks.together():
            best.record(epoch, loss)
        if best.ended and epoch < epochs and main:
            lowest = f"the loss on held-out images was lowest after epoch {best.epoch}"
            say(f"ended after epoch {best.last} of {epochs}: {lowest}")
    student_run.report(done - 1, per_epoch, m, accelerator, measured)
    # A checkpoint is only saved here, where all running sums are empty and need not be stored.
    if done < epochs * per_epoch and (within == 0 or _agreed(student_run.checkpoint.due, accelerator)):
        student_run.finish_report()
        with ranks.together(), ranks.slow():
            student_run.checkpoint.save(done, write=main)
        ranks.wait()  # the first process writes the file


def _agreed(due: bool, accelerator: Accelerator) -> bool:
    """Return what the first process decides by its clock, because all processes must gather the state together."""
    if accelerator.num_processes == 1:
        return due
    with current().together():
        return bool(broadcast(torch.tensor(due, device=accelerator.device)))


def _of_first(value: float, accelerator: Accelerator) -> float:
    """Return a number of the first process, because all processes must decide alike."""
    if accelerator.num_processes == 1:
        return value
    with current().together():
        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)))


def _note(student_runs: Sequence[StudentRun]) -> str:
    losses = [f"{t.loss:.4f}" for t in student_runs if t.loss]
    return f"loss {', '.join(losses)}" if losses else ""
