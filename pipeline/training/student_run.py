"""A student in training: one step of its optimiser, its rate, its log and its checkpoint."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pipeline.config import DistillConfig
from pipeline.runtime.progress import Meter
from pipeline.runtime.ranks import current
from pipeline.teachers.backbone import Backbone
from pipeline.training.batch import Batch
from pipeline.training.checkpoint import Checkpoint, RunLog
from pipeline.training.distiller import Distiller
from pipeline.training.trackers import Tracking
from singer.errors import UserError


class StudentRun:
    """A student in training: its model (on its device, wrapped for several processes), optimiser, checkpoint and log.

    first_step: the step from which it continues; ema: the moving average of the student's weights, if any;
    distiller: the model before it was wrapped.
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
        distiller: Distiller,
    ) -> None:
        self.settings, self.student, self.model, self.optimiser = settings, student, model, optimiser
        self.checkpoint, self.log, self.tracking = checkpoint, log, tracking
        self.first_step, self.ema, self.distiller = first_step, ema, distiller
        self.peak = peak_rate(settings, student.width)
        self.loss = 0.0
        self._sums: dict[str, Tensor] = {}
        self._since = 0

    def update(self, step: int, per_epoch: int, batch: Batch, accelerator: Accelerator) -> None:
        """Do one step of the optimiser."""
        # The random numbers of a model (drop path, dropout, masks) depend only on the step. A resumed run repeats them,
        # and a student that shares the pass with others draws the same as it would alone.
        torch.manual_seed(_step_seed(self.settings.seed, step, accelerator.process_index))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, step, per_epoch, self.peak)
        if self.distiller.dropout is not None:
            self.distiller.dropout.share = token_share(self.settings, step, per_epoch)
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

    def report(
        self, step: int, per_epoch: int, m: Meter, accelerator: Accelerator, held_out: Mapping[str, Any] | None = None
    ) -> None:
        """Log the mean losses since the last report. Raises UserError if their sum is not finite.

        held_out: figures of records that are held out, see HeldOut.measure.
        """
        parts = {name: float(v) / self._since for name, v in _mean(self._sums, accelerator).items()}
        self.loss = sum(parts.values())
        if not math.isfinite(self.loss):
            raise UserError(f"the loss is {self.loss} at step {step + 1}; lower distill.lr or use precision no")
        figures = {
            "epoch": (step + 1) / per_epoch,
            "lr": learning_rate(self.settings, step, per_epoch, self.peak),
            "loss": self.loss,
            "images_per_second": m.rate,
            "data_wait_percent": m.wait_percent,
        }
        held_out = held_out or {}
        self.log.write(step=step + 1, **figures, parts=parts, **held_out)
        if self.tracking is not None:
            explained = held_out.get("explained_variance", {})
            more = {f"loss/{name}": value for name, value in parts.items()}
            more |= {f"explained_variance/{block}": value for block, value in explained.items()}
            more |= {name: held_out[name] for name in ("held_out_loss",) if name in held_out}
            self.tracking.log(step + 1, figures | more)
        self._sums, self._since = {}, 0


def _mean(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the means of some sums over all processes."""
    with current().together():
        found: dict[str, Tensor] = accelerator.reduce(sums, "mean")
        return found


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "little")


def peak_rate(settings: DistillConfig, width: int) -> float:
    """Return distill.lr, or its rule for a student `width` channels wide.

    At 96 channels 4e-3 was better than 2e-3, and that better than 1e-3 (docs/log.md). Other widths were not measured:
    the rate of Adam falls as 1 / width (Tensor Programs V, arXiv:2203.03466), which gives the usual ones of ViTs, 2e-3
    for ViT-Ti, 1e-3 for ViT-S and 5e-4 for ViT-B.
    """
    return 4e-3 * min(1.0, 96 / width) if settings.lr == "auto" else settings.lr


def learning_rate(settings: DistillConfig, step: int, per_epoch: int, peak: float) -> float:
    """Return the learning rate: a linear warm-up over warmup_epochs, then half a cosine down to final_lr · peak."""
    warm = settings.warmup_epochs * per_epoch
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, settings.epochs * per_epoch - 1 - warm)
    return peak * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def token_share(settings: DistillConfig, step: int, per_epoch: int) -> float:
    """Return the share of its patches that a student sees: distill.token_share, and all in the last steps."""
    last = settings.epochs * per_epoch * (1 - settings.whole_share)
    return settings.token_share if step < last else 1.0
