"""The processes (ranks) of a stage: what its code reports while it works, so that none waits for one that is dead.

watched_rank.py watches them; failure_detector.py finds the ranks that have failed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from singer.errors import UserError

SECONDS = "SINGER_RANK_SECONDS"
_DEFAULT_SECONDS = 300.0


def limit_seconds() -> float:
    """Return for how many seconds a rank may make no progress. Raises UserError if the variable does not say so."""
    text = os.environ.get(SECONDS, "")
    try:
        seconds = float(text) if text else _DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UserError(f"{SECONDS} is {text!r}; set it to a number of seconds above 0, or unset it")
    return seconds


class Ranks:
    """One rank among those of a stage. With one process every method does nothing."""

    def __init__(self, stage: str, rank: int, world: int) -> None:
        self.stage, self.rank, self.world = stage, rank, world

    @property
    def is_first(self) -> bool:
        """Return whether this is the first rank, which does what is done once."""
        return self.rank == 0

    def beat(self) -> None:
        """Report that the work goes on."""

    def step(self, where: str) -> None:
        """Report a step of the work: the next report follows soon. where: place in the work, for messages."""

    def rest(self) -> None:
        """Report that the steps have ended: the next report may take long."""

    def wait(self) -> None:
        """Wait until all ranks have come here, however long they work."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Mark a block in which the rank may be waiting for others in collective operations."""
        yield

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Mark a block that takes long without a report, such as a checkpoint."""
        yield


_ALONE = Ranks("", 0, 1)
_current: Ranks = _ALONE


def current() -> Ranks:
    """Return the ranks of the stage that runs in this process; with one process their methods do nothing."""
    return _current


@contextmanager
def working_as(ranks: Ranks) -> Iterator[None]:
    """Let current() return these ranks until the block ends."""
    global _current
    _current = ranks
    try:
        yield
    finally:
        _current = _ALONE
