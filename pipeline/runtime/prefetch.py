"""Reading ahead in threads. Decoding images and reading features release the interpreter lock."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
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
    left = iter(items)
    most = 2 * workers if most is None else most
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        try:
            while True:
                ahead += [pool.submit(load, item) for item in islice(left, most + 1 - len(ahead))]
                if not ahead:
                    return
                current().beat()
                with nullcontext() if meter is None else meter.waiting():
                    ahead[0].exception()  # waits, and raises nothing yet
                # No name holds the batch, so that its memory is free as soon as the caller has done with it.
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
