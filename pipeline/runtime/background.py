"""Work in a background thread while the caller goes on; the counterpart of reading ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self

import torch

from pipeline.runtime.ranks import current

Arguments = ParamSpec("Arguments")


class BackgroundWorker(Generic[Arguments]):
    """Calls a function in order in one other thread. At most one call runs; the next one waits for it.

    If a call raises an error, the next one raises it, or the end of the `with` block if no other error ends it. Create
    the worker before other threads begin to compute: for a moment, new threads get one core.
    """

    def __init__(self, run: Callable[Arguments, None], name: str) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None
        threads = torch.get_num_threads()
        self._pool.submit(_compute_alone).result()
        torch.set_num_threads(threads)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Wait for the last call, then start the next one."""
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
    """Let this thread compute on one core, because the others are busy.

    A second team of OpenMP threads would also make the first one sleep where it would have waited awake.
    """
    # A thread takes over the number of the others when it is first asked for it; it must not do so later.
    torch.get_num_threads()
    # This sets the number for this thread, and for all later threads until it is set back.
    torch.set_num_threads(1)
