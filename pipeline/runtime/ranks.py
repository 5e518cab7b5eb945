"""Watching the processes (ranks) of a stage, so that no rank waits for hours for one that is dead or hangs.

The first rank is the hub: every other rank holds a connection to it. A thread in each rank reports every second how far
the work has come. The work itself counts its steps (`beat`), so that a living thread cannot hide a main thread that
hangs.

A rank is to blame if its connection ends (it is dead), if it sends nothing (it is stopped, or its machine is lost), or
if it works by itself and makes no progress. A rank that may be waiting for others (`together`, `wait`) is to blame only
if all are there and nothing moves; then the ranks that came least far are named.
"""

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as ready_of
from typing import TYPE_CHECKING, Any, NoReturn

from singer.errors import UserError

if TYPE_CHECKING:  # code that only shows progress needs no torch
    from accelerate import Accelerator

# The port on which the first rank listens, and a token by which it knows the others.
Place = tuple[int, str]

SECONDS = "SINGER_RANK_SECONDS"
_DEFAULT_SECONDS = 300.0
# Work that reports no steps (compiling, the first batch, a checkpoint, a closed form) may take this many times as long.
_SLOW = 12
# A rank that has reported why it ends gets some seconds to print it before the others end.
_ENDED_GRACE, _FAILED_GRACE, _ERROR_GRACE, _SIGTERM_GRACE = 2.0, 10.0, 5.0, 1.0
_MOST_BYTES = 1 << 16


def limit_seconds() -> float:
    """Return for how many seconds a rank may make no progress. Raises UserError if the variable is no such number."""
    text = os.environ.get(SECONDS, "")
    try:
        seconds = float(text) if text else _DEFAULT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UserError(f"{SECONDS} is {text!r}; set it to a number of seconds above 0, or unset it")
    return seconds


@dataclass
class Status:
    """What a rank reports about itself.

    state: "runs", "done", "failed" or "terminated"; where: its last report; count: reports since the last barrier;
    age: seconds since the last report; patience: seconds that the next one may take; joined: it may be waiting for
    others; barrier: number of barriers that it has come to.
    """

    rank: int
    host: str
    state: str = "runs"
    where: str = "the start"
    count: int = 0
    age: float = 0.0
    patience: float = 0.0
    joined: bool = False
    barrier: int = 0


class _Connection:
    """Lines of JSON over a socket; nothing here blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket, self.ended = sock, False
        self._in, self._out = b"", b""

    def send(self, value: object) -> None:
        """Send a value, or as much of it as the socket takes now; the rest goes first the next time."""
        # A peer that does not read is stopped. The bytes that wait for it must not grow without end.
        if len(self._out) < _MOST_BYTES:
            self._out += json.dumps(value).encode() + b"\n"
        try:
            self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._out = b""  # receive() finds that the peer has ended

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come; none if the peer has ended (`ended`) or sends something else."""
        try:
            data = self.socket.recv(_MOST_BYTES)
            self.ended = not data
        except BlockingIOError:
            return []
        except OSError:
            self.ended = True
            return []
        *lines, self._in = (self._in + data).split(b"\n")
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            values = [None]
        if len(self._in) > _MOST_BYTES or not all(isinstance(v, dict) for v in values):
            self.ended = True
            return []
        return values


class Ranks:
    """One rank among those of a stage. With one process every method does nothing."""

    def __init__(self, stage: str, rank: int, world: int) -> None:
        self.stage, self.rank, self.world = stage, rank, world

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


class _Watched(Ranks):
    """A rank among others: its main thread reports, and another thread watches."""

    def __init__(self, stage: str, rank: int, world: int, share: Callable[[Place], Place]) -> None:
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
        server, place = _listen() if rank == 0 else (None, (0, ""))
        port, token = share(place)
        self._peers: dict[int, _Connection] = {}
        self._known: dict[int, Status] = {}
        self._heard: dict[int, float] = {}
        self._marked: dict[int, tuple[str, float]] = {}
        if server is not None:
            self._accept(server, token)
        else:
            sock = socket.create_connection((_master(), port), timeout=max(60.0, self._limit))
            sock.sendall(json.dumps({"token": token, **asdict(self._status)}).encode() + b"\n")
            self._peers[0] = _Connection(sock)
            self._known[0], self._heard[0] = Status(0, _master()), 0.0
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def _accept(self, server: socket.socket, token: str) -> None:
        """Take the connections of all other ranks."""
        end = time.monotonic() + max(60.0, self._limit)
        strangers: dict[Any, _Connection] = {}
        with server:
            server.setblocking(False)
            while len(self._peers) < self.world - 1:
                if time.monotonic() > end:
                    lacking = sorted(set(range(1, self.world)) - set(self._peers))
                    raise UserError(f"ranks {lacking} did not connect to rank 0; look at their output and start again")
                for ready in ready_of([server, *strangers], 1.0):
                    if ready is server:
                        with suppress(OSError):
                            sock = server.accept()[0]
                            strangers[sock] = _Connection(sock)
                        continue
                    peer = strangers[ready]
                    hello = peer.receive()
                    if not hello and not peer.ended:
                        continue
                    del strangers[ready]
                    if not hello or not secrets.compare_digest(str(hello[0].pop("token", "")), token):
                        peer.socket.close()
                        continue
                    status = Status(**hello[0])
                    self._peers[status.rank], self._known[status.rank] = peer, status
                    self._heard[status.rank] = 0.0
        for peer in strangers.values():
            peer.socket.close()

    # The main thread calls these methods.

    def beat(self) -> None:
        if threading.get_ident() == self._thread:
            self._status.count += 1
            self._reports += 1

    def step(self, where: str) -> None:
        if threading.get_ident() == self._thread:
            self._status.where, self._status.patience = where, self._limit
            self.beat()

    def rest(self) -> None:
        if threading.get_ident() == self._thread:
            self._status.patience = _SLOW * self._limit
            self.beat()

    def wait(self) -> None:
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
        before, self._status.joined = self._status.joined, True
        try:
            yield
        finally:
            self._reports += 1
            self._status.joined = before

    @contextmanager
    def slow(self) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        before, self._status.patience = self._status.patience, _SLOW * self._limit
        try:
            yield
        finally:
            self._reports += 1
            self._status.patience = before

    def __enter__(self) -> "_Watched":
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
                if signal.SIGTERM in self._wake_end.recv(_MOST_BYTES) and self._terminated is None:
                    self._terminated = self._awake
                    if self._status.state == "runs":
                        self._status.state = "terminated"
            for rank, peer in self._peers.items():
                if peer.socket in ready:
                    for message in peer.receive():
                        self._hear(rank, message)
            if self._reports != self._seen:
                self._seen, self._moved = self._reports, self._awake
            self._status.age = self._awake - self._moved
            if self.rank == 0:
                self._judge()
                self._open_barrier()
            else:
                self._judge_hub()
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

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        self._heard[rank] = self._awake
        if "end" in message:
            os._exit(2)  # the first rank has printed why
        self._known[rank] = Status(**message["status"])
        if self.rank:
            self._pass(message["passed"])

    def _open_barrier(self) -> None:
        all_at = min([self._status.barrier, *(s.barrier for s in self._known.values())])
        if all_at > self._passed:
            self._pass(all_at)
            self._tell()

    def _pass(self, barrier: int) -> None:
        with self._changed:
            self._passed = max(self._passed, barrier)
            self._changed.notify_all()

    def _gone(self, rank: int) -> str | None:
        """Return why another rank will do no more work, or None if it may."""
        state, ended, heard = self._known[rank].state, self._peers[rank].ended, self._heard[rank]
        if state == "done":
            return None
        silent = self._awake - heard
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
            since = self._marked[rank] = f"{state} {ended}", self._awake
        return what if self._awake - since[1] > grace else None

    def _judge(self) -> None:
        """End the run if a rank is dead, silent or hangs."""
        if self._status.state in ("done", "failed"):
            return
        for rank, status in sorted(self._known.items()):
            why = self._gone(rank)
            if why is not None:
                self._end([status], why)
        if self._terminated is not None:
            return
        everyone = [self._status, *(self._known[r] for r in sorted(self._known))]
        ages = {s.rank: s.age + (self._awake - self._heard[s.rank] if s.rank else 0.0) for s in everyone}
        alone = [s for s in everyone if not s.joined]
        for status in alone:
            if status.state == "runs" and ages[status.rank] > status.patience:
                self._end([status], f"has made no progress for {ages[status.rank]:.0f} s")
        patience = max(s.patience for s in everyone)
        # At a barrier that all ranks have reached none waits for another: it is about to open.
        if not alone and min(s.barrier for s in everyone) <= self._passed and min(ages.values()) > patience:
            # A rank at a barrier certainly waits for the others.
            outside = [s for s in everyone if s.barrier <= self._passed] or everyone
            least = min(s.count for s in outside)
            late = [s for s in outside if s.count == least]
            self._end(late, f"has made no progress for {min(ages.values()):.0f} s")

    def _judge_hub(self) -> None:
        """End this process if the first rank is dead or silent."""
        if self._status.state in ("done", "failed"):
            return
        why = self._gone(0)
        if why is not None:
            # All others find the same and cannot agree which of them prints it, so the second rank does.
            self._end([self._known[0]], why, speaks=self.rank == 1)

    def _end(self, guilty: list[Status], why: str, speaks: bool = True) -> NoReturn:
        """End this process, and tell the others to end. speaks: print the line that names the guilty ranks."""
        if speaks:
            names = ", ".join(f"rank {s.rank} on {s.host}" for s in guilty)
            if len(guilty) > 1:
                why = why.replace("has ", "have ", 1)
            line = (
                f"error: {names} {why}, last seen at {guilty[0].where} of {self.stage}; "
                "this run ends. Continue it with --resume when the cause is removed\n"
            )
            # A stream has a lock, and the code that hangs may hold it.
            os.write(2, line.encode())
        for peer in self._peers.values():
            peer.send({"end": True})
        os._exit(2)


def _master() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _listen() -> tuple[socket.socket, Place]:
    """Open a server for the other ranks. Return it, its port, and a token by which it knows them."""
    if _master() in ("127.0.0.1", "localhost"):
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    return server, (server.getsockname()[1], secrets.token_hex(16))


_ALONE = Ranks("", 0, 1)
_current: Ranks = _ALONE


def current() -> Ranks:
    """Return the ranks of the stage that runs in this process; with one process their methods do nothing."""
    return _current


@contextmanager
def watched(accelerator: "Accelerator", stage: str) -> Iterator[Ranks]:
    """Watch the processes of a stage until all have come to the end of this block.

    If one dies or hangs, the others end with exit code 2, and one line names it. Raises UserError if one does not
    connect. With one process this does nothing.
    """
    global _current
    if accelerator.num_processes == 1:
        yield _ALONE
        return
    from accelerate.utils import broadcast_object_list

    def share(place: Place) -> Place:
        port, token = broadcast_object_list([place])[0]
        return port, token

    with _Watched(stage, accelerator.process_index, accelerator.num_processes, share) as ranks:
        _current = ranks
        try:
            yield ranks
        finally:
            _current = _ALONE
