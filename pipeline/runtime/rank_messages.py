"""What ranks tell each other: lines of JSON over sockets. The first rank is the hub to which all others connect."""

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as ready_of
from typing import Any

from singer.errors import UserError

# The port on which the first rank listens, and a token by which it knows the others.
Address = tuple[int, str]
MOST_BYTES = 1 << 16


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


class Connection:
    """Lines of JSON over a socket; nothing here blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket, self.ended = sock, False
        self._in, self._out = b"", b""

    def send(self, value: object) -> None:
        """Send a value, or as much of it as the socket takes now; the rest goes first the next time."""
        # A peer that does not read is stopped. The bytes that wait for it must not grow without end.
        if len(self._out) < MOST_BYTES:
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
            data = self.socket.recv(MOST_BYTES)
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
        if len(self._in) > MOST_BYTES or not all(isinstance(v, dict) for v in values):
            self.ended = True
            return []
        return values


def master() -> str:
    """Return the address of the first rank, from the environment."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def listen() -> tuple[socket.socket, Address]:
    """Open a server for the other ranks. Return it, its port, and a token by which it knows them."""
    if master() in ("127.0.0.1", "localhost"):
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    return server, (server.getsockname()[1], secrets.token_hex(16))


def accept(server: socket.socket, token: str, world: int, seconds: float) -> list[tuple[Connection, Status]]:
    """Take the connections of all other ranks, with their first reports.

    Raises UserError if a rank does not connect within some seconds.
    """
    end, found = time.monotonic() + seconds, dict[int, tuple[Connection, Status]]()
    strangers: dict[Any, Connection] = {}
    with server:
        server.setblocking(False)
        while len(found) < world - 1:
            if time.monotonic() > end:
                lacking = sorted(set(range(1, world)) - set(found))
                raise UserError(f"ranks {lacking} did not connect to rank 0; look at their output and start again")
            for ready in ready_of([server, *strangers], 1.0):
                if ready is server:
                    with suppress(OSError):
                        sock = server.accept()[0]
                        strangers[sock] = Connection(sock)
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
                found[status.rank] = peer, status
    for peer in strangers.values():
        peer.socket.close()
    return list(found.values())
