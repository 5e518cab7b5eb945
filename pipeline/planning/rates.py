"""Measured rates: work a second, in three repeats, alone and beside other work."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing

import torch

from pipeline.data.background import BackgroundWorker
from pipeline.planning.costs import Rate

REPEATS = 3


def rate_of(steps: Generator[int, None, None], seconds: float, device: torch.device | None = None) -> Rate:
    """How fast an endless generator goes whose every step tells how many records it has done; the first warms up.

    seconds: in all, as three repeats. device: which is waited for after each repeat. The generator is closed.
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


def rate_beside(steps: Generator[int, None, None], busy: Callable[[], object], seconds: float) -> Rate:
    """As rate_of, in a thread of its own while this one is busy."""
    found: list[Rate] = []
    over = threading.Event()

    def run() -> None:
        try:
            found.append(rate_of(steps, seconds))
        finally:
            over.set()

    with BackgroundWorker(run, "measure") as behind:
        behind()
        while not over.is_set():
            busy()
    return found[0]
