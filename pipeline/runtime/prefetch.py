"""Reading ahead in threads. Decoding images and reading features release the interpreter lock."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipeline.runtime.progress import Meter
from pipeline.runtime.ranks import current

Item = TypeVar("Item")
Batch = TypeVar("Batch")


def prefetch(
    load: Callable[[Item], Batch],
    items: Iterable[Item],
    workers: int,
    meter: Meter | None = None,
    most: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield load(item) for every item in order, with up to `most` items ahead (default: 2 · workers).

    The meter counts the time spent on waiting. An exception in `load` is raised in place of its batch.
    """
    ahead: deque[Future[Batch]] = deque()
    most = 2 * workers if most is None else most
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                ahead.append(pool.submit(load, item))
                if len(ahead) > most:
                    yield _take(ahead, meter)
            while ahead:
                yield _take(ahead, meter)
        finally:
            for future in ahead:
                future.cancel()


def _take(ahead: deque[Future[Batch]], meter: Meter | None) -> Batch:
    current().beat()
    future = ahead.popleft()
    if meter is None:
        return future.result()
    with meter.waiting():
        return future.result()
