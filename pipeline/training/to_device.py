"""Copy batches to a GPU while it computes: one is on its way while the step of the one before runs."""

from collections import deque
from collections.abc import Generator, Iterable
from functools import partial

import torch

from pipeline.runtime.buffers import moved
from pipeline.runtime.progress import Meter
from pipeline.training.batch import Batch


def on_device(
    batches: Iterable[Batch], device: torch.device, meter: Meter | None = None
) -> Generator[Batch, None, None]:
    """Yield batches on the device; the caller starts the step of each one before it asks for the next.

    Steps on a GPU only begin when they are started. So the next batch is read, and copied on a stream of its own, while
    the GPU computes; the step waits for the copy on the GPU. The caller is held back until the step before the last has
    ended: at most two batches are on the device, the one in use and the next one. The meter then counts a wait for
    data only if it leaves the GPU without work.
    """
    move = partial(moved, device=device)
    if device.type != "cuda":
        yield from batches if device.type == "cpu" else (batch.map(move) for batch in batches)
        return
    copies, steps = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    started: deque[torch.cuda.Event] = deque()
    if meter is not None:
        meter.busy = lambda: bool(started) and not started[-1].query()

    def use(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(steps)  # its memory must not be reused before the step has ended
        return tensor

    for batch in batches:
        with torch.cuda.stream(copies):
            there = batch.map(move)
        steps.wait_stream(copies)
        yield there.map(use)
        started.append(steps.record_event())
        if len(started) > 1:
            started.popleft().synchronize()
