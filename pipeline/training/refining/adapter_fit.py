"""Fit adapters to a cache by gradient descent: the training half of stage 2.

Blocks share no parameters, so each block is fitted by itself until it has converged. The blocks are divided among the
processes, and any number of processes gives the same adapters. Blocks are only fitted together where a loss couples
them (the authors' L_info).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.cache.reader import Cache
from pipeline.config import RefineConfig
from pipeline.outputs.resuming import FIT_CHECKPOINT, FITTED
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import meter
from pipeline.storage.tensors import read_tensors, write_tensors
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.refining.refiner_fit import RefinerFit
from pipeline.training.run_log import RunLog
from singer.adapter_losses import COUPLED, RefinementBatch, adapter_losses
from singer.errors import UserError
from singer.refiner import Refiner

_WINDOW = 50
_FACTOR = 0.3
_DROPS = 3
_LOG_EVERY = 10
_SAVE_MINUTES = 0.25


def groups(blocks: tuple[int, ...], info_form: str) -> list[tuple[int, ...]]:
    """Return the groups of blocks that must be fitted together."""
    return [blocks] if info_form in COUPLED else [(b,) for b in blocks]


def fitted_file(out: Path, group: tuple[int, ...]) -> Path:
    """Return the file of a group's fitted adapters."""
    return out / f"{FITTED}{_name(group)}.safetensors"


def log_file(out: Path, group: tuple[int, ...]) -> Path:
    """Return the log of a group's fit."""
    return out / f"log-{_name(group)}.jsonl"


def _name(group: tuple[int, ...]) -> str:
    return "-".join(map(str, group))


@dataclass
class ReduceOnPlateau:
    """The schedule of a fit.

    The learning rate falls when the mean loss of a window of steps is not better than the best mean by more than
    `tolerance` (relative). The fit ends when the rate has fallen more than _DROPS times, or if the loss of a window is
    0: there was nothing to clean.
    """

    tolerance: float
    best: float = float("inf")
    drops: int = 0
    total: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self.total += loss
        self.count += 1
        if self.count == _WINDOW:
            mean = self.total / self.count
            if not mean < (1 - self.tolerance) * self.best:
                self.drops += 1
            self.best = min(self.best, mean)
            self.total, self.count = 0.0, 0

    @property
    def factor(self) -> float:
        """Return the factor by which to multiply the initial learning rate."""
        return _FACTOR**self.drops

    @property
    def over(self) -> bool:
        """Return whether the fit has converged."""
        return self.drops > _DROPS or self.best == 0

    def state_dict(self) -> dict[str, float]:
        """Return all state, for a checkpoint."""
        return {"best": self.best, "drops": self.drops, "total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.best, self.total = state["best"], state["total"]
        self.drops, self.count = int(state["drops"]), int(state["count"])


def fit_adapters(fit: RefinerFit, group: tuple[int, ...], out: Path) -> None:
    """Fit the adapters of a group of blocks and store them in `out`; an interrupted fit continues.

    Raises UserError if the fit diverges.
    """
    file = fitted_file(out, group)
    if file.exists():
        return
    settings, refiner = fit.settings, fit.refiner
    cache = Cache(fit.cache.place, None, group, settings.local_copies, fit.cache.id)  # reads only these blocks
    adapters = torch.nn.ModuleDict({str(b): refiner.cleaner(b) for b in group})
    # One kernel for all weights, where there is one; on CPUs the default stays.
    fused = fit.device.type == "cuda" or None
    optimiser = torch.optim.AdamW(adapters.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=fused)
    plateau = ReduceOnPlateau(settings.tolerance)
    checkpoint = Checkpoint(
        out / f"{FIT_CHECKPOINT}{_name(group)}.pt",
        {"adapters": adapters, "optimiser": optimiser, "plateau": plateau},
        _SAVE_MINUTES,
    )
    first = checkpoint.restore()
    log = RunLog(log_file(out, group), first, True)
    prefix = cache.manifest.teacher.prefix_tokens
    grids = {b: refiner.cleaner(b).spec.grid for b in group}
    order = batch_order(fit.records, settings, settings.steps if plateau.over else first)
    with meter(f"refine block {_name(group)}", settings.steps, "steps", done=first) as m:
        for step, encoded in enumerate(prefetch(cache.read, order, 1, m), start=first):
            features = cache.decode(encoded, fit.device)
            refined = {b: refiner.clean(x, b) for b, x in features.items()}
            batch = RefinementBatch(features, refined, fit.suffix, fit.scales, prefix, grids)
            losses = adapter_losses(
                batch, group, settings.outlier_form, settings.info_form, settings.quantile, settings.loss_weights
            )
            total = losses.total
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            for options in optimiser.param_groups:
                options["lr"] = settings.lr * plateau.factor
            optimiser.step()
            loss = float(total.detach())
            if not np.isfinite(loss):
                raise diverged(settings)
            plateau.add(loss)
            m.advance(1, f"loss {loss:.4f}")
            done = step + 1
            if done % _LOG_EVERY == 0 or plateau.over or done == settings.steps:
                named = losses.parts.items()
                parts = {f"{n}.{b}": float(v.detach()) for n, by_block in named for b, v in by_block.items()}
                log.write(step=done, loss=loss, lr=settings.lr * plateau.factor, **parts)
                if checkpoint.due:
                    checkpoint.save(done)
            if plateau.over:
                break
    if not all(torch.isfinite(p).all() for p in adapters.parameters()):
        raise diverged(settings)
    write_tensors(file, adapters.state_dict())
    checkpoint.path.unlink(missing_ok=True)


def diverged(settings: RefineConfig) -> UserError:
    """Return the error for adapters whose loss, weights or figures are not finite."""
    return UserError(f"the adapters diverged; lower refine.lr (it is {settings.lr})")


def load_fitted(refiner: Refiner, group: tuple[int, ...], out: Path) -> None:
    """Load the fitted adapters of a group, which any process may have fitted, into the refiner."""
    adapters = torch.nn.ModuleDict({str(b): refiner.cleaner(b) for b in group})
    adapters.load_state_dict(read_tensors(fitted_file(out, group)))


def batch_order(records: np.ndarray, settings: RefineConfig, first: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of records from step `first` to `steps`, epoch after epoch; the order depends only on the seed.

    Fewer records than a batch has are one batch.
    """
    size = min(settings.batch_size, len(records))
    per_epoch = len(records) // size
    shuffled = records
    for step in range(first, settings.steps):
        epoch, within = divmod(step, per_epoch)
        if within == 0 or step == first:
            shuffled = np.random.default_rng([settings.seed, 1, epoch]).permutation(records)
        yield shuffled[within * size : (within + 1) * size]
