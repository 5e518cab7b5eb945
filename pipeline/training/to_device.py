"""Copy batches to a GPU while it computes: one is on its way while the step of the one before runs."""

from collections import deque
from collections.abc import Generator, Iterable
from functools import partial

import torch

from pipeline.runtime.buffers import moved
from pipeline.training.batch import Batch


class StartedSteps:
    """The steps that a GPU was given and may not have ended: the last two."""

    def __init__(self) -> None:
        self._ends: deque[torch.cuda.Event] = deque()

    def busy(self) -> bool:
        """Return whether the last step goes on."""
        return bool(self._ends) and not self._ends[-1].query()

    def add(self, end: torch.cuda.Event) -> None:
        """Add a step, by the event at its end, and wait for the end of the one before it."""
        self._ends.append(end)
        if len(self._ends) > 1:
            self._ends.popleft().synchronize()


def on_device(
    batches: Iterable[Batch], device: torch.device, started: StartedSteps | None = None
) -> Generator[Batch, None, None]:
    """Yield batches on the device; the caller starts the step of each one before it asks for the next.

    Steps on a GPU only begin when they are started. So the next batch is read, and copied on a stream of its own, while
    the GPU computes; the step waits for the copy on the GPU. The caller is held back until the step before the last has
    ended: at most two batches are on the device, the one in use and the next one. started: where steps are noted, so
    that a meter can count a wait for data only if it leaves the GPU without work.
    """
    move = partial(moved, device=device)
    if device.type != "cuda":
        yield from batches if device.type == "cpu" else (batch.map(move) for batch in batches)
        return
    copies, steps = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    started = started or StartedSteps()

    def use(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(steps)  # its memory must not be reused before the step has ended
        return tensor

    for batch in batches:
        with torch.cuda.stream(copies):
            there = batch.map(move)
        steps.wait_stream(copies)
        yield there.map(use)
        started.add(steps.record_event())
