"""A student in training: one step of its optimiser, its rate, its log and its checkpoint."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pipeline.cache.stored import Encoded
from pipeline.config import TrainingConfig
from pipeline.models.backbone import Backbone
from pipeline.runtime.compiling import Compilable, any_length
from pipeline.runtime.progress import Meter
from pipeline.runtime.ranks import current
from pipeline.training.batch import Batch
from pipeline.training.best_epoch import Best, State, whole_states
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.learner import Learner
from pipeline.training.run_log import RunLog
from pipeline.training.schedule import learning_rate, peak_rate
from pipeline.training.trackers import Tracking
from singer.errors import UserError


@dataclass(kw_only=True, eq=False)
class StudentRun:
    """A student in training: its model (on its device, ready for its steps), optimiser, checkpoint and log.

    first_step: the step from which it continues; steps: those done; ema: the moving average of the student's weights,
    if any; learner: the model before it was wrapped; best: its best epoch, if images are held out.
    """

    settings: TrainingConfig
    student: Backbone
    model: Compilable[nn.Module]
    optimiser: torch.optim.Optimizer
    checkpoint: Checkpoint
    log: RunLog
    tracking: Tracking | None
    first_step: int
    ema: ModelEmaV3 | None
    learner: Learner
    best: Best | None

    def __post_init__(self) -> None:
        self.steps = self.first_step
        self.peak = peak_rate(self.settings, self.student.body_width)
        # A run that had ended before it was interrupted takes no step any more, and keeps what it had logged.
        self.loss = self.log.loss
        self._sums: dict[str, Tensor] = {}
        self._since = 0
        self._report: Report | None = None

    def update(self, batch: Batch, per_epoch: int, accelerator: Accelerator) -> None:
        """Do one step of the optimiser. per_epoch: the steps in an epoch."""
        step = batch.step
        # The random numbers of a model (drop path, dropout, masks) depend only on the step. A resumed run repeats them,
        # and a student that shares the pass with others draws the same as it would alone.
        torch.manual_seed(_step_seed(self.settings.seed, step, accelerator.process_index))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, step, per_epoch, self.peak) * group.get("lr_scale", 1.0)
        batch = self.learner.begin_step(batch, per_epoch)
        for name, loss in self.model.run(partial(self._gradients, batch, accelerator)).items():
            self._sums[name] = self._sums.get(name, 0) + loss
        if self.settings.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.plain.parameters(), self.settings.clip_grad)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update(self.student.model, step)
        self._since += 1
        self.steps = step + 1
        self.finish_report()

    @property
    def ended(self) -> bool:
        """Return whether it ended before its last epoch."""
        return self.best is not None and self.best.ended

    @property
    def kept_epoch(self) -> int | None:
        """Return the epoch after which the student is kept; None for the last."""
        return self.best.epoch if self.best is not None and self.best.states is not None else None

    def final_states(self) -> tuple[State, State]:
        """Return the states that are stored: those of the best epoch, if they are kept, or the last ones.

        All processes call it together. Raises UserError if they are not finite: no loss sees the last update.
        """
        student = self.student.model if self.ema is None else self.ema.module
        kept = self.best.states if self.best is not None else None
        states = kept or whole_states(student, self.learner)
        # A buffer may be a mask of infinities.
        buffers = {name for model in (student, self.learner) for name, _ in model.named_buffers()}
        weights = [x for state in states for name, x in state.items() if name not in buffers and x.is_floating_point()]
        if not all(bool(x.isfinite().all()) for x in weights):
            section = self.settings.section
            raise UserError(f"the weights are not finite after the last step; lower {section}.lr or use precision no")
        return states

    def finish(self, store: Callable[[State, State], None], main: bool) -> None:
        """Store the final states, see final_states; then remove the checkpoint, and close the trackers.

        All processes call it together; only the first one (main) stores.
        """
        with current().together():
            states = self.final_states()
        if main:
            store(*states)
            self.checkpoint.path.unlink(missing_ok=True)
            if self.tracking is not None:
                self.tracking.close()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average, if there is one, in the student's place until the block ends."""
        if self.ema is None:
            yield
            return
        with torch.no_grad():
            own = list(self.student.model.state_dict().values())
            before = [tensor.clone() for tensor in own]
            for tensor, mean in zip(own, self.ema.module.state_dict().values(), strict=True):
                tensor.copy_(mean)
            try:
                yield
            finally:
                for tensor, value in zip(own, before, strict=True):
                    tensor.copy_(value)

    def _gradients(self, batch: Batch, accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
        """Compute the gradients of a batch, in parts if distill.accumulate asks for it; return its losses."""
        self.optimiser.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        parts = [batch]
        if self.settings.accumulate > 1:
            parts = list(self.learner.decoded(batch).split(self.settings.accumulate))
        for number, part in enumerate(parts, start=1):
            for features in part.features:
                for x in features.varying() if isinstance(features, Encoded) else ():
                    any_length(x)
            with accelerator.no_sync(model) if number < len(parts) else nullcontext():
                losses, _ = model(part)
                current().beat()
                accelerator.backward(torch.stack(list(losses.values())).sum())
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        return sums

    def report(
        self, step: int, per_epoch: int, m: Meter, accelerator: Accelerator, held_out: Mapping[str, Any] | None = None
    ) -> None:
        """Start to report the mean losses since the last report; it is finished after the next step.

        A GPU has then computed them, so that reading them does not wait for it. held_out: figures of records that are
        held out, see held_out.measure.
        """
        self.finish_report()
        with current().together():
            means: dict[str, Tensor] = accelerator.reduce(self._sums, "mean")
        self._report = Report(
            step, per_epoch, m.rate, m.wait_percent, list(means), self._since, fetched(means.values()), held_out or {}
        )
        self._sums, self._since = {}, 0

    def finish_report(self) -> None:
        """Log the report that was started, if there is one. Raises UserError if the loss is not finite."""
        if self._report is None:
            return
        report, self._report = self._report, None
        step, per_epoch, held_out = report.step, report.per_epoch, report.held_out
        parts = {name: v / report.steps for name, v in zip(report.names, report.sums(), strict=True)}
        self.loss = sum(parts.values())
        if not math.isfinite(self.loss):
            section = self.settings.section
            raise UserError(f"the loss is {self.loss} at step {step + 1}; lower {section}.lr or use precision no")
        figures = {
            "epoch": (step + 1) / per_epoch,
            "lr": learning_rate(self.settings, step, per_epoch, self.peak),
            "loss": self.loss,
            "images_per_second": report.rate,
            "data_wait_percent": report.wait_percent,
        }
        self.log.write(step=step + 1, **figures, parts=parts, **held_out)
        if self.tracking is not None:
            more = {f"loss/{name}": value for name, value in parts.items()}
            for name, value in held_out.items():
                more |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            self.tracking.log(step + 1, figures | more)


@dataclass(frozen=True)
class Report:
    """What a report says: of which step, the speed until then, and the sums of the losses of so many steps.

    sums: returns the value of each name, once it has arrived on the CPU; held_out: see held_out.measure.
    """

    step: int
    per_epoch: int
    rate: float
    wait_percent: float
    names: list[str]
    steps: int
    sums: Callable[[], list[float]]
    held_out: Mapping[str, Any]


def fetched(values: Iterable[Tensor]) -> Callable[[], list[float]]:
    """Start to copy scalars to the CPU; return a function that waits for them and returns them."""
    together = torch.stack(list(values))
    if together.device.type != "cuda":
        return together.tolist
    there = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    there.copy_(together, non_blocking=True)
    arrived = torch.cuda.current_stream(together.device).record_event()

    def wait() -> list[float]:
        arrived.synchronize()
        found: list[float] = there.tolist()
        return found

    return wait


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "little")
