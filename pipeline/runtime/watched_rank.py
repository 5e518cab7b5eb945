"""Watch the processes (ranks) of a stage, so that no rank waits for hours for one that is dead or hangs.

The first rank is the hub: every other rank holds a connection to it. A thread in each rank reports every second how far
the work has come. The work itself counts its steps (`beat`), so that a living thread cannot hide a main thread that
hangs.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import wait as ready_of
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.runtime.failure_detector import FailureDetector
from pipeline.runtime.rank_messages import MOST_BYTES, Address, Connection, Status, accept, listen, master
from pipeline.runtime.ranks import Ranks, limit_seconds, working_as

if TYPE_CHECKING:  # a process that only watches needs no torch
    from accelerate import Accelerator, PartialState

# Work that reports no steps (compiling, the first batch, a checkpoint, a closed form) may take this many times as long.
_SLOW = 12
# The seconds in which a rank reports to the others why it ends.
_FAILED_GRACE, _ERROR_GRACE, _SIGTERM_GRACE = 10.0, 5.0, 1.0


class WatchedRank(Ranks):
    """A rank among others: its main thread reports, and another thread watches."""

    def __init__(self, stage: str, rank: int, world: int, share: Callable[[Address], Address]) -> None:
        super().__init__(stage, rank, world)
        self._limit = limit_seconds()
        self._tick = min(1.0, self._limit / 10)
        self._status = Status(self.rank, socket.gethostname(), patience=_SLOW * self._limit)
        self._thread = threading.get_ident()
        self._changed = threading.Condition()
        self._passed, self._reports = 0, 0
        # Seconds in which this process has run. It may have been suspended, and so may its machine.
        self._awake, self._moved, self._seen = 0.0, 0.0, -1
        self._terminated: float | None = None
        self._wake_end, self._alarm = socket.socketpair()
        for end in (self._wake_end, self._alarm):
            end.setblocking(False)
        self._told = threading.Event()
        server, place = listen() if rank == 0 else (None, (0, ""))
        port, token = share(place)
        self._peers: dict[int, Connection] = {}
        self._others = FailureDetector(self._limit)
        if server is not None:
            for peer, status in accept(server, token, world, max(60.0, self._limit)):
                self._peers[status.rank] = peer
                self._others.hear(status, 0.0)
        else:
            sock = socket.create_connection((master(), port), timeout=max(60.0, self._limit))
            sock.sendall(json.dumps({"token": token, **asdict(self._status)}).encode() + b"\n")
            self._peers[0] = Connection(sock)
            self._others.hear(Status(0, master()), 0.0)
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    # The main thread calls these methods.

    def beat(self) -> None:
        """Report that the work goes on."""
        if threading.get_ident() == self._thread:
            self._status.count += 1
            self._reports += 1

    def step(self, where: str) -> None:
        """Report a step of the work: the next report follows within the limit."""
        if threading.get_ident() == self._thread:
            self._status.where, self._status.patience = where, self._limit
            self.beat()

    def rest(self) -> None:
        """Report that the steps have ended: the next report may take many limits."""
        if threading.get_ident() == self._thread:
            self._status.patience = _SLOW * self._limit
            self.beat()

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        status = self._status
        with self.together(), self._changed:
            status.barrier += 1
            self._wake()
            self._changed.wait_for(lambda: self._passed >= status.barrier)
            # From here on, ranks that do the same work have reported the same number of times.
            status.count = 0
            self._reports += 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Mark a block in which the rank may be waiting for others."""
        before, self._status.joined = self._status.joined, True
        try:
            yield
        finally:
            self._reports += 1
            self._status.joined = before

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Mark a block that takes long without a report."""
        if threading.get_ident() != self._thread:
            yield
            return
        before, self._status.patience = self._status.patience, _SLOW * self._limit
        try:
            yield
        finally:
            self._reports += 1
            self._status.patience = before

    def __enter__(self) -> "WatchedRank":
        self._signals: tuple[Any, int] | None = None
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # A launcher ends all ranks when one is dead. The watcher needs some time to report why.
            descriptor = signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
            self._signals = signal.signal(signal.SIGTERM, lambda *_: None), descriptor
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
            self._status.state = "done"
        else:
            if isinstance(error, RuntimeError):
                # A collective operation fails when another rank dies. The watcher reports that rank first.
                time.sleep(_ERROR_GRACE)
            self._status.state = "failed"
        self._wake()
        # Before this process ends, it must have told the others why.
        self._told.wait(_FAILED_GRACE)
        if self._signals is not None:
            signal.signal(signal.SIGTERM, self._signals[0])
            signal.set_wakeup_fd(self._signals[1])

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is full of alarms
            self._alarm.send(b"\0")

    # The watching thread calls these methods.

    def _watch(self) -> None:
        next_word = last = time.monotonic()
        while True:
            readable = [p.socket for p in self._peers.values() if not p.ended]
            pause = max(0.0, min(next_word - time.monotonic(), self._tick))
            ready = ready_of([self._wake_end, *readable], pause)
            now = time.monotonic()
            self._awake += min(now - last, 2 * self._tick)
            last = now
            if self._wake_end in ready:
                next_word = now
                if signal.SIGTERM in self._wake_end.recv(MOST_BYTES) and self._terminated is None:
                    self._terminated = self._awake
                    if self._status.state == "runs":
                        self._status.state = "terminated"
            for peer in self._peers.values():
                if peer.socket in ready:
                    for message in peer.receive():
                        self._hear(message)
            if self._reports != self._seen:
                self._seen, self._moved = self._reports, self._awake
            self._status.age = self._awake - self._moved
            self._check_others()
            if self.rank == 0:
                self._open_barrier()
            if now >= next_word:
                next_word = now + self._tick
                self._tell()
            if self._status.state in ("done", "failed"):
                self._tell()
                self._told.set()
                # The hub ends last: a connection that ends without a report is that of a dead rank.
                if all(p.ended for p in self._peers.values()) or (self.rank and self._status.state == "done"):
                    for peer in self._peers.values():
                        peer.socket.close()
                    return
            if self._terminated is not None and self._awake - self._terminated > _SIGTERM_GRACE:
                os._exit(128 + signal.SIGTERM)

    def _tell(self) -> None:
        for peer in self._peers.values():
            peer.send({"status": asdict(self._status), "passed": self._passed})

    def _hear(self, message: dict[str, Any]) -> None:
        if "end" in message:
            os._exit(2)  # the first rank has printed why
        self._others.hear(Status(**message["status"]), self._awake)
        if self.rank:
            self._pass(message["passed"])

    def _open_barrier(self) -> None:
        all_at = min([self._status.barrier, *(s.barrier for s in self._others.known.values())])
        if all_at > self._passed:
            self._pass(all_at)
            self._tell()

    def _pass(self, barrier: int) -> None:
        with self._changed:
            self._passed = max(self._passed, barrier)
            self._changed.notify_all()

    def _check_others(self) -> None:
        """End this process if another rank is dead or silent; the first rank also ends the run if a rank hangs."""
        if self._status.state in ("done", "failed"):
            return
        ended = {rank for rank, peer in self._peers.items() if peer.ended}
        found = self._others.departure(ended, self._awake)
        if found is None and self.rank == 0 and self._terminated is None:
            found = self._others.delay(self._status, self._passed, self._awake)
        if found is not None:
            # If the first rank is gone, all others find the same and cannot agree which of them prints it.
            self._end(*found, speaks=self.rank <= 1)

    def _end(self, failed: list[Status], why: str, speaks: bool) -> NoReturn:
        """End this process, and tell the others to end. speaks: print the line that names the failed ranks."""
        if speaks:
            names = ", ".join(f"rank {s.rank} on {s.host}" for s in failed)
            if len(failed) > 1:
                why = why.replace("has ", "have ", 1)
            line = (
                f"error: {names} {why}, last seen at {failed[0].where} of {self.stage}; "
                "this run ends. Continue it with --resume when the cause is removed\n"
            )
            # A stream has a lock, and the code that hangs may hold it.
            os.write(2, line.encode())
        for peer in self._peers.values():
            peer.send({"end": True})
        os._exit(2)


@contextmanager
def watched(process: "Accelerator | PartialState", stage: str) -> Iterator[Ranks]:
    """Watch the processes of a stage until all have come to the end of this block.

    If one dies or hangs, the others end with exit code 2, and one line names it. Raises UserError if one does not
    connect. With one process this does nothing. process: this one, see devices.this_process.
    """
    if process.num_processes == 1:
        yield Ranks(stage, 0, 1)
        return
    from accelerate.utils import broadcast_object_list

    def share(address: Address) -> Address:
        port, token = broadcast_object_list([address])[0]
        return port, token

    with WatchedRank(stage, process.process_index, process.num_processes, share) as ranks, working_as(ranks):
        yield ranks


def wait_for_all(process: "PartialState", stage: str) -> None:
    """Wait, between stages, until all processes have come here. Raises UserError if one does not connect."""
    with watched(process, stage):
        pass
