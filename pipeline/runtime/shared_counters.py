"""Counters that the processes of a stage share, so that each of them takes the next piece of work when it is free."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate.utils import broadcast_object_list

from pipeline.runtime.rank_messages import master
from pipeline.runtime.ranks import Ranks


@contextmanager
def shared_counters(ranks: Ranks) -> Iterator[Callable[[str, int], int]]:
    """Give add(name, amount), which returns the new value of a counter; all of them start at 0.

    All processes come to the block together, and leave it together unless it fails.
    """
    if ranks.world == 1:
        counts = Counter[str]()

        def add(name: str, amount: int) -> int:
            counts[name] += amount
            return counts[name]

        yield add
        return
    # One process does without, as some builds of torch have to.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(master(), 0, is_master=True, wait_for_workers=False) if ranks.is_first else None
    with ranks.together():
        (port,) = broadcast_object_list([store.port if store is not None else None])
        store = store or TCPStore(master(), port, is_master=False, wait_for_workers=False)
    yield store.add
    ranks.wait()  # the first process holds the counters
