"""A folder for measurements beside the future cache; it is removed at the end, even after an error or SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.storage import Place, is_remote, open_store
from pipeline.storage.disk import existing

SCRATCH = ".singer-plan"


@contextmanager
def scratch(out: Place) -> Iterator[Place]:
    """Provide a place on the disk, or in the bucket, of `out`; it is emptied before and removed afterwards.

    SIGTERM removes it, too. If a plan is killed, the next plan at the same place removes the leftovers. Raises
    UserError if another plan is running there.
    """
    place: Place = f"{str(out).rstrip('/')}/{SCRATCH}" if is_remote(out) else existing(Path(out)) / SCRATCH
    store = open_store(place)
    with _terminated(), store.lock():
        store.clear()
        try:
            yield place
        finally:
            store.clear()


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM raise an exception, as Ctrl-C does, so that the scratch folder is removed; commands do so anyway."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
