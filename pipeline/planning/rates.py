"""Measured rates: work a second, in three repeats, alone or beside other work."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing

import torch

from pipeline.planning.costs import Rate
from pipeline.runtime.background import BackgroundWorker

REPEATS = 3


def rate_of(steps: Generator[int, None, None], seconds: float, device: torch.device | None = None) -> Rate:
    """Measure the records a second of an endless generator, which yields after each step how many records it did.

    The first step warms up and does not count. seconds: the time of all three repeats; device: the device to wait for
    after each repeat. The generator is closed in the end.
    """

    def wait() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)

    repeats: list[tuple[float, float]] = []
    with closing(steps):
        next(steps)
        for _ in range(REPEATS):
            wait()
            start, done = time.perf_counter(), 0
            while done == 0 or time.perf_counter() - start < seconds / REPEATS:
                done += next(steps)
            wait()
            repeats.append((done, time.perf_counter() - start))
    return Rate.of(repeats)


def rate_beside(
    steps: Generator[int, None, None], busy: Callable[[], object], seconds: float, device: torch.device | None = None
) -> Rate:
    """Measure as rate_of does, in a second thread, while this thread calls `busy`."""
    found: list[Rate] = []
    finished = threading.Event()

    def run() -> None:
        try:
            found.append(rate_of(steps, seconds, device))
        finally:
            finished.set()

    with BackgroundWorker(run, "measure") as start:
        start()
        while not finished.is_set():
            busy()
    return found[0]
