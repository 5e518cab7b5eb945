"""Work that follows in threads of its own while whoever gives it goes on; the counterpart of reading ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self

import torch

from pipeline.runtime.ranks import current

Arguments = ParamSpec("Arguments")


class BackgroundWorker(Generic[Arguments]):
    """Calls of a function, in order, in one thread. At most one is under way: the next one waits for it.

    What a call raises is raised by the next one, or at the end of the `with` block if nothing else ends it. Make it
    before other threads begin to compute: for a moment, new ones are given one core.
    """

    def __init__(self, run: Callable[Arguments, None], name: str) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None
        threads = torch.get_num_threads()
        self._pool.submit(_compute_alone).result()
        torch.set_num_threads(threads)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        self._wait()
        self._last = self._pool.submit(self._run, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()

    def _wait(self) -> None:
        if self._last is not None:
            with current().slow():  # a shard may go to slow storage
                self._last.result()


def _compute_alone() -> None:
    """One core for what this thread computes, as the others are busy.

    A second team of OpenMP threads would also make the first one sleep where it would have waited awake.
    """
    # Before its first answer a thread has not taken over the number of the others, and still would.
    torch.get_num_threads()
    # Its own from here on, but also that of all later threads, until somebody sets it back.
    torch.set_num_threads(1)
