"""Stores of the tests: an S3 server, and what they do to stores and read from them."""

import contextlib
import re
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from obstore.store import S3Store

from pipeline.storage import Ranges, ReadThrough, Store, remote

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


# A dead lock is waited for; a live one is renewed four times in so long, on a machine with other work too.
LOCK_SECONDS = 4.0


class Server:
    """An S3 server in a process of its own, on loopback. It ends with this process, at the latest."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            command = [sys.executable, "-c", _SERVER]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def empty(self) -> None:
        """Leave one bucket, with nothing in it."""
        for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):
            urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{path}", method=method)).close()

    def stop(self) -> None:
        self._process.communicate("")

    def environment(self) -> dict[str, str]:
        """Without credentials, obstore would ask the network for some."""
        names = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        return names | {"AWS_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}

    def requests(self, method: str, path: str) -> int:
        """How many requests of the method there have been so far to places that match."""
        return len(re.findall(rf'"[^" ]*{method} /bucket/{path}', self._log.read_text()))


def give_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote.RETRY, "retry_timeout", timedelta(seconds=0.5))
    monkeypatch.setitem(remote.CLIENT, "read_timeout", "500ms")


def raw(url: str) -> S3Store:
    """obstore's own client, for what stores do not show."""
    return S3Store.from_url(url, client_options={"allow_http": True})


def ranges(store: Store | ReadThrough, name: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    sizes = np.array(lengths, np.int64)
    out, ends = np.empty(sizes.sum(), np.uint8), np.cumsum(sizes)
    which = np.zeros(len(sizes), np.int64)
    store.read_ranges(Ranges([name], which, np.array(offsets, np.int64), sizes, out, ends - sizes))
    return [part.tobytes() for part in np.split(out, ends[:-1])] if len(sizes) else []


def kill_while_writing(code: str) -> None:
    """Run it in a process that dies by SIGKILL where it would make its bytes durable."""
    start = "import os, signal; from pathlib import Path; from pipeline.storage import *\n"
    start += "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", start + code]).returncode == -signal.SIGKILL


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel refuses as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
