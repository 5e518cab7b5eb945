"""Find the ranks that have failed when the work does not go on.

A rank has failed if its connection ends (it is dead), if it sends nothing (it is stopped, or its machine is lost), or
if it works by itself and makes no progress. A rank that may be waiting for others (`together`, `wait`) has failed only
if all are there and nothing moves; then the ranks that came least far are named.
"""

from collections.abc import Collection

from pipeline.runtime.rank_messages import Status

FailedRanks = tuple[list[Status], str]
"""The ranks that have failed, and why."""

# A rank that has reported why it ends gets some seconds to print it before the others end.
_ENDED_GRACE, _FAILED_GRACE = 2.0, 10.0


class FailureDetector:
    """What is known of the other ranks: known: {rank: its last report}. Times are seconds that this process has run.

    limit: for how many seconds a rank may be silent.
    """

    def __init__(self, limit: float) -> None:
        self.known: dict[int, Status] = {}
        self._limit = limit
        self._heard: dict[int, float] = {}
        self._marked: dict[int, tuple[str, float]] = {}

    def hear(self, status: Status, now: float) -> None:
        """Take a report."""
        self.known[status.rank], self._heard[status.rank] = status, now

    def departure(self, ended: Collection[int], now: float) -> FailedRanks | None:
        """Return the first rank that will do no more work, and why; None if all may. ended: lost connections."""
        for rank, status in sorted(self.known.items()):
            why = self._gone(rank, rank in ended, now)
            if why is not None:
                return [status], why
        return None

    def delay(self, own: Status, passed: int, now: float) -> FailedRanks | None:
        """Return the ranks that hang, and why; None if there are none. passed: number of barriers that have opened."""
        everyone = [own, *(self.known[r] for r in sorted(self.known))]
        ages = {s.rank: s.age + (now - self._heard[s.rank] if s.rank != own.rank else 0.0) for s in everyone}
        alone = [s for s in everyone if not s.joined]
        for status in alone:
            if status.state == "runs" and ages[status.rank] > status.patience:
                return [status], f"has made no progress for {ages[status.rank]:.0f} s"
        # At a barrier that all ranks have reached none waits for another: it is about to open.
        if alone or min(s.barrier for s in everyone) > passed:
            return None
        if min(ages.values()) <= max(s.patience for s in everyone):
            return None
        # A rank at a barrier certainly waits for the others.
        outside = [s for s in everyone if s.barrier <= passed] or everyone
        least = min(s.count for s in outside)
        return [s for s in outside if s.count == least], f"has made no progress for {min(ages.values()):.0f} s"

    def _gone(self, rank: int, ended: bool, now: float) -> str | None:
        """Return why another rank will do no more work, or None if it may."""
        state, silent = self.known[rank].state, now - self._heard[rank]
        if state == "done":
            return None
        if state == "runs":
            if ended:
                return "is dead"
            return f"has not answered for {silent:.0f} s" if silent > self._limit else None
        if state == "terminated":
            what, grace = "was told to end (SIGTERM)", _ENDED_GRACE
        else:
            what, grace = "has ended with an error, which it prints", _ENDED_GRACE if ended else _FAILED_GRACE
        since = self._marked.get(rank)
        if since is None or since[0] != f"{state} {ended}":
            since = self._marked[rank] = f"{state} {ended}", now
        return what if now - since[1] > grace else None
