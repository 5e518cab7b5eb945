"""Stores: one contract for folders and object stores, all or nothing, one writer, and errors of one line."""

import contextlib
import errno
import hashlib
import http.server
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from conftest import seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.exceptions import AlreadyExistsError
from obstore.store import GCSStore, S3Store

from pipeline.storage import (
    LOCK,
    LocalStore,
    Ranges,
    ReadThrough,
    RemoteStore,
    Store,
    joined_reads,
    locks,
    open_store,
    remote,
    whole_file,
)
from pipeline.training.run_log import RunLog
from singer.errors import UserError

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
    """An S3 server in a process of its own, on loopback, with one bucket. It ends with this process, at the latest."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            command = [sys.executable, "-c", _SERVER]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")).close()

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


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    give_up_soon(monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(locks, "SECONDS", LOCK_SECONDS)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    return f"s3://bucket/{request.node.name}".translate(str.maketrans("[]", "--"))


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> Path | str:
    return tmp_path / "store" if request.param == "local" else url


@pytest.fixture
def store(place: Path | str) -> Store:
    return open_store(place)


def raw(url: str) -> S3Store:
    """obstore's own client, for what stores do not show."""
    return S3Store.from_url(url, client_options={"allow_http": True})


def ranges(store: Store | ReadThrough, name: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    sizes = np.array(lengths, np.int64)
    out, ends = np.empty(sizes.sum(), np.uint8), np.cumsum(sizes)
    which = np.zeros(len(sizes), np.int64)
    store.read_ranges(Ranges([name], which, np.array(offsets, np.int64), sizes, out, ends - sizes))
    return [part.tobytes() for part in np.split(out, ends[:-1])] if len(sizes) else []


def test_objects_are_read_as_written(store: Store, place: Path | str) -> None:
    store.write("a/b", b"one ", memoryview(b"two"), b"")
    store.write("empty")
    assert store.read("a/b") == open_store(place).read("a/b") == b"one two"
    assert store.read("empty") == b""
    store.write("a/b", b"shorter")
    assert store.read("a/b") == b"shorter"
    for missing in ("a", "c", "empty/c"):
        with pytest.raises(FileNotFoundError):
            store.read(missing)


def test_ranges(store: Store) -> None:
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [8, 0, 3, 8, 5], [2, 3, 0, 1, 5]) == [b"89", b"012", b"", b"8", b"56789"]
    assert ranges(store, "ten", [], []) == []
    for offset in (8, 20):
        with pytest.raises(UserError, match="/ten ends too early; run singer cache verify"):
            ranges(store, "ten", [0, offset], [1, 3])
    for name in ("nine", "ten/nine"):
        with pytest.raises(UserError, match=f"/{name} is missing; run singer cache verify"):
            ranges(store, name, [0], [1])


def test_ranges_of_what_was_replaced(store: Store) -> None:
    """Shards are written anew by --repair and --resume while a store is in use."""
    for content in (b"old", b"new", b"newer"):
        store.write("a", content)
        assert ranges(store, "a", [0], [len(content)]) == [content]
    store.remove("a")
    with pytest.raises(UserError, match="is missing"):
        ranges(store, "a", [0], [1])


def test_sizes_are_of_the_folder(store: Store, place: Path | str) -> None:
    names = ["journal/1", "journal/2/x", "journal2/1", "journal", "with space", "ü", "a%20b", "a+b"]
    if isinstance(place, Path):
        names.remove("journal")  # no file can be where a folder is
    for i, name in enumerate(names):
        store.write(name, b"x" * i)
    open_store(f"{place}2").write("sibling", b"x")
    everything = dict(zip(names, range(len(names)), strict=True))
    assert store.sizes() == everything
    assert store.sizes("journal") == {n: s for n, s in everything.items() if n.startswith("journal/")}
    assert store.sizes("journal/2") == {"journal/2/x": 1}
    assert store.sizes("nothing") == store.sizes("with space") == {}
    for name in names:
        assert len(store.read(name)) == everything[name]


def test_child(store: Store, place: Path | str) -> None:
    store.write("x", b"outer")
    child = store.child("parts/001")
    child.write("x", b"inner")
    child.child("deep").write("y", b"1")
    assert child.url == f"{place}/parts/001" and child.read("x") == b"inner"
    assert child.sizes() == {"x": 5, "deep/y": 1} and child.sizes("deep") == {"deep/y": 1}
    assert ranges(child, "x", [1], [2]) == [b"nn"]
    assert store.sizes() == {"x": 5, "parts/001/x": 5, "parts/001/deep/y": 1}
    child.remove("x")
    child.remove("x")
    assert set(store.sizes("parts")) == {"parts/001/deep/y"}
    child.clear()
    assert store.sizes() == {"x": 5}


def test_clear(store: Store, place: Path | str) -> None:
    store.clear()
    for name in ("a", "b/c", "z"):
        store.write(name, b"1")
    assert ranges(store, "z", [0], [1]) == [b"1"]
    open_store(f"{place}2").write("sibling", b"x")
    with store.lock():
        store.clear(last="b/c")
        with pytest.raises(UserError, match="being written"), open_store(place).lock():
            pass
    assert store.sizes() == {}
    with pytest.raises(UserError, match="is missing"):
        ranges(store, "z", [0], [1])
    assert open_store(f"{place}2").sizes() == {"sibling": 1}


def test_interrupted_clear_leaves_what_tells_whose_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, delete = open_store(url), obstore.delete
    for name in ("a", "known", "z"):
        store.write(name, b"1")
    calls: list[object] = []

    def dies_second(client: object, names: object) -> None:
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        delete(client, names)  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "delete", dies_second)
    with pytest.raises(KeyboardInterrupt):
        store.clear(last="known")
    assert store.sizes() == {"known": 1}


def test_one_writer(store: Store, place: Path | str) -> None:
    with store.lock():
        for again in (store, open_store(place)):
            with pytest.raises(UserError, match="is being written by another run"), again.lock():
                pass
        store.write("a", b"1")
        assert store.sizes() == {"a": 1}
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), open_store(place).lock():
            raise error
    with store.lock():
        pass
    assert store.sizes() == {"a": 1}
    if isinstance(place, Path):
        assert not list(place.parent.glob(".*"))
    else:
        assert [e["path"] for e in obstore.list(raw(place)).collect()] == ["a"]


def test_threads_share_a_store(store: Store) -> None:
    """Each object changes from one content to another; readers see either, whole."""
    old, new = b"o" * 5000, b"n" * 5000
    store.write("a", old)
    seen: set[bytes] = set()

    def read() -> None:
        for _ in range(15):
            seen.update({store.read("a"), *ranges(store, "a", [0], [5000])})

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    store.write("a", new)
    for thread in threads:
        thread.join()
    assert seen <= {old, new} and store.read("a") == new == ranges(store, "a", [0], [5000])[0]


def test_large_objects_travel_in_pieces(url: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PIECE", 5 * 2**20)  # the smallest that S3 takes
    store, data = open_store(url), os.urandom(2**20) * 11
    name = url.rpartition("/")[2]
    seen: list[dict[str, int]] = []
    done = threading.Event()

    looked = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            seen.append(store.sizes())
            looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    assert looked.wait(600)
    store.write("large", data[: 2**20], memoryview(data)[2**20 :])
    done.set()
    thread.join()
    assert {} in seen and all(sizes in ({}, {"large": len(data)}) for sizes in seen)
    assert server.requests("PUT", f"{name}/large.*partNumber") == 3
    before = server.requests("GET", f"{name}/large")
    assert store.read("large") == data
    assert server.requests("GET", f"{name}/large") - before == 1 + 3
    # Ranges that are far from each other are fetched alone, near ones together.
    for offsets, requests in (([len(data) - 3, 1], 2), ([3 * 2**20, 1], 2), ([1, 2**19], 1)):
        before = server.requests("GET", f"{name}/large")
        assert ranges(store, "large", offsets, [3, 3]) == [data[o : o + 3] for o in offsets]
        assert server.requests("GET", f"{name}/large") - before == requests


def test_files_stay_open_only_as_long_as_needed(tmp_path: Path) -> None:
    def count() -> int:
        return sum(str(tmp_path) in str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())

    store = LocalStore(tmp_path)
    for i in range(5):
        store.write(f"{i}", b"1")
        ranges(store, f"{i}", [0], [1])
    assert count() == 5
    store.write("0", b"2")
    store.remove("1")
    assert count() == 3
    del store
    assert count() == 0


def kill_while_writing(code: str) -> None:
    """Run it in a process that dies by SIGKILL where it would make its bytes durable."""
    start = "import os, signal; from pathlib import Path; from pipeline.storage import *\n"
    start += "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert subprocess.run([sys.executable, "-c", start + code]).returncode == -signal.SIGKILL


def test_killed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "store"
    LocalStore(out).write("a/b", b"old")
    kill_while_writing(f"LocalStore(Path({str(out)!r})).write('a/b', b'new content')")
    (rest,) = (f for f in out.rglob("*") if f.is_file() and f.name != "b")
    assert rest.read_bytes() == b"new content"
    store = LocalStore(out)
    assert store.sizes() == {"a/b": 3} and store.read("a/b") == b"old"
    with store.lock():
        assert not rest.exists()
    assert store.sizes() == {"a/b": 3}


def test_killed_removal_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    store.write("a/b", b"1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: None)
        store.clear()
    assert store.sizes() == {} and list(tmp_path.iterdir())
    with store.lock():
        pass
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel refuses as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    for content in (b"one", b"two"):
        store = LocalStore(tmp_path / "run")
        with store.lock():
            store.clear()
            store.write("file", content)
        assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run" / "file").read_bytes() == content
    # The folder has one lock, by whichever name.
    with (
        LocalStore(tmp_path / "run").lock(),
        pytest.raises(UserError, match="is being written by another run"),
        LocalStore(tmp_path / "disk" / "run").lock(),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "run"] and len([*(tmp_path / "disk").iterdir()]) == 1
    # A kill in mid-removal leaves a link to nothing.
    (tmp_path / "disk" / "run").rename(tmp_path / "disk" / ".run.removed")
    with LocalStore(tmp_path / "run").lock():
        LocalStore(tmp_path / "run").write("file", b"three")
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["run"] and (tmp_path / "run").is_symlink()


def test_a_mount_point_is_emptied_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system renames no mount point; a removal that is interrupted leaves the file that says whose folder it is."""
    store, removed = LocalStore(tmp_path / "mount"), []
    for name in ("a", "provenance.json", "shards/b", "z"):
        store.write(name, b"content")
    (tmp_path / "mount" / "link").symlink_to(tmp_path)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    def unlink(self: Path) -> None:
        removed.append(self.name)
        os.unlink(self)  # noqa: PTH108

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "unlink", unlink)
    store.clear(last="provenance.json")
    assert (tmp_path / "mount").is_dir() and store.sizes() == {}
    assert removed[-1] == "provenance.json" and sorted(removed) == ["a", "link", "provenance.json", "z"]


@pytest.mark.parametrize("there", [True, False], ids=["a volume", "no folder"])
def test_a_folder_whose_parent_is_closed(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open

    def refuse(self: Path, *args: Any) -> Any:
        if self == tmp_path / ".out.lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return open_file(self, *args)

    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(UserError if there else PermissionError) as caught,
        LocalStore(tmp_path / "out").lock(),
    ):
        pass
    if there:
        assert str(caught.value).endswith(f"give a folder inside it, such as {tmp_path / 'out' / 'run'}")
        with LocalStore(tmp_path / "out" / "run").lock():  # the remedy works
            LocalStore(tmp_path / "out" / "run").write("file", b"content")


def test_the_current_folder_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is beside it, not in it, where it would look like an output."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with LocalStore(Path()).lock():
        assert LocalStore(Path()).sizes() == {} and [p.name for p in tmp_path.iterdir() if p.is_file()] == [".run.lock"]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"old")
    with file_limit(1000), pytest.raises(OSError) as caught:
        store.write("a", b"x" * 900, b"y" * 900)
    assert caught.value.filename == str(tmp_path / "a") and caught.value.strerror == "File too large"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and store.read("a") == b"old"


def test_full_disk_names_the_file_of_others(tmp_path: Path) -> None:
    """What a library or a plain file object writes names no file."""
    log = RunLog(tmp_path / "log.jsonl", 0, True)
    log._path = full = Path("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        log.write(step=1)
    assert caught.value.filename == str(full)
    with pytest.raises(OSError, match="No space") as caught, whole_file(tmp_path / "a"), full.open("w") as file:
        file.write("a")
        file.flush()
    assert caught.value.filename == str(tmp_path / "a")


# The lock of an object store.


def lock_object(url: str) -> str:
    return bytes(obstore.get(raw(url), LOCK).bytes()).decode()


def test_a_dead_lock_is_taken_over(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    obstore.put(raw(url), LOCK, b"somewhere process 7\ntoken 1")
    start = time.monotonic()
    with open_store(url).lock():
        assert time.monotonic() - start > locks.SECONDS
        assert f"process {os.getpid()}" in lock_object(url)
    assert f"{url} is locked by somewhere process 7; watching for 4 s" in capfd.readouterr().err
    assert obstore.list(raw(url)).collect() == []


def test_a_live_lock_is_renewed_and_respected(url: str) -> None:
    with open_store(url).lock():
        for _ in range(2):
            before = lock_object(url)
            with pytest.raises(UserError, match=rf"{url} is being written by .* \(\S+ process {os.getpid()}\)"):
                open_store(url).lock().__enter__()
            assert lock_object(url) != before  # the sign of life that it has seen


def test_of_two_who_take_over_one_wins(url: str) -> None:
    obstore.put(raw(url), LOCK, b"somewhere process 7\ntoken 1")
    results: list[str] = []
    refused = threading.Semaphore(0)

    def take() -> None:
        try:
            with open_store(url).lock():
                results.append("held")
                for _ in range(2):
                    refused.acquire(timeout=600)
        except UserError as error:
            results.append(str(error))
            refused.release()

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("held") == 1
    assert sum("is being written by another run" in r for r in results) == 2


def test_who_loses_the_lock_stops(url: str) -> None:
    """As after a long outage or a suspended machine, in which another run has taken over."""
    store = open_store(url)
    part = store.child("parts/001")
    other = open_store(f"{url}2")
    with pytest.raises(UserError, match=f"{url} has been taken over by another run"), store.lock():
        part.write("mine", b"1")
        obstore.put(raw(url), LOCK, b"other process 8\ntoken 1")
        while not locks.lost:
            time.sleep(0.01)
        other.write("free", b"1")
        for victim in (part, open_store(url)):
            with pytest.raises(UserError, match="has been taken over by another run"):
                victim.write("late", b"1")
    assert other.sizes() == {"free": 1}
    assert lock_object(url) == "other process 8\ntoken 1" and store.sizes() == {"parts/001/mine": 1}
    # Noticed at the end, if not before.
    obstore.delete(raw(url), LOCK)
    with pytest.raises(UserError, match="has been taken over"), store.lock():
        obstore.delete(raw(url), LOCK)
    assert not locks.lost


def test_a_lost_answer_loses_no_lock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again by itself, and is told that there is something already."""
    put, calls = obstore.put, []

    def puts_twice(client: object, name: str, data: object, **options: object) -> object:
        result = put(client, name, data, **options)  # type: ignore[call-overload]
        if name == LOCK:
            calls.append(data)
            raise AlreadyExistsError("there is one")
        return result

    monkeypatch.setattr(obstore, "put", puts_twice)
    with open_store(url).lock():
        open_store(url).write("a", b"1")
    assert len(calls) >= 2 and open_store(url).sizes() == {"a": 1}


# Copies of remote objects.


class Source(LocalStore):
    """Counts, and takes its time."""

    reads = 0

    def read(self, name: str) -> bytes:
        self.reads += 1
        time.sleep(0.1)
        return super().read(name)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    source = Source(tmp_path / "source")
    source.write("a", b"content")
    return source


def test_copies_are_made_once(source: Source, tmp_path: Path) -> None:
    """By whichever thread or process comes first: a lock on a file tells neither from the other."""
    sums = {"a": sha256(b"content")}
    shared = ReadThrough(source, tmp_path / "copy", sums)
    readers = [shared, shared, *(ReadThrough(source, tmp_path / "copy", sums) for _ in range(3))]
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda r=r: found.extend(ranges(r, "a", [3], [4]))) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"tent"] * 5 and source.reads == 1
    assert [f.read_bytes() for f in (tmp_path / "copy").iterdir()] == [b"content"]
    assert shared.url == source.url


def test_a_copy_of_what_was_replaced_is_not_used(source: Source, tmp_path: Path) -> None:
    for content in (b"content", b"another"):
        source.write("a", content)
        reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(content)})
        assert ranges(reader, "a", [0], [7]) == [content]


def test_wrong_bytes_are_not_kept(source: Source, tmp_path: Path) -> None:
    reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(b"content")})
    source.write("a", b"cOntent")
    for _ in range(2):
        with pytest.raises(UserError, match="/a does not match its checksum; run singer cache verify"):
            ranges(reader, "a", [0], [1])
        assert not list((tmp_path / "copy").iterdir())
    source.write("a", b"content")
    assert ranges(reader, "a", [0], [7]) == [b"content"]


def test_killed_copy_does_not_count(source: Source, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    source.write("a", b"much more content")
    kill_while_writing(
        f"source, copy = LocalStore(Path({str(source.path)!r})), Path({str(copy)!r})\n"
        f"checksums = {{'a': {sha256(b'much more content')!r}}}\n"
        "import numpy as np\nzero, out = np.zeros(1, int), np.empty(1, np.uint8)\n"
        "ReadThrough(source, copy, checksums).read_ranges(Ranges(['a'], zero, zero, zero + 1, out, zero))"
    )
    (rest,) = copy.iterdir()
    assert rest.name.endswith(".singer-tmp") and rest.read_bytes() == b"much more content"
    rest.write_bytes(b"torn " * 9)
    reader = ReadThrough(source, copy, {"a": sha256(b"much more content")})
    assert ranges(reader, "a", [0], [17]) == [b"much more content"] and source.reads == 1
    assert [f.read_bytes() for f in copy.iterdir()] == [b"much more content"]


def test_full_disk_of_copies(source: Source, tmp_path: Path) -> None:
    data = b"x" * 5000
    source.write("a", data)
    reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(data)})
    with file_limit(1000), pytest.raises(OSError) as caught:
        ranges(reader, "a", [0], [1])
    assert caught.value.filename == str(tmp_path / "copy" / sha256(data))
    assert not list((tmp_path / "copy").iterdir())
    assert ranges(reader, "a", [4999], [1]) == [b"x"]


# What goes wrong on the way to an object store.


@contextlib.contextmanager
def answering(*answers: tuple[int, bytes] | None) -> Iterator[str]:
    """The endpoint of a server with these answers, of which the last one stays. None: accept, but never answer."""
    left = list(answers)
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer is None:
                released.wait(60)
                return
            self.send_response(answer[0])
            for name, value in {"Content-Length": len(answer[1]), "ETag": '"1"', "Last-Modified": _MODIFIED}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(answer[1])

        do_PUT = do_DELETE = do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        released.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


_MODIFIED = "Sat, 21 Nov 2026 06:00:00 GMT"
_DENIED = b"<?xml version='1.0'?>\n<Error><Code>InvalidAccessKeyId</Code><Message>No such key\n id.</Message></Error>"

ACTIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a"),
    "ranges": lambda store: ranges(store, "a", [0], [1]),
    "write": lambda store: store.write("a", b"1"),
    "sizes": lambda store: store.sizes(),
    "remove": lambda store: store.remove("a"),
    "lock": lambda store: store.lock().__enter__(),
}


def one_line(action: Callable[[Store], object], place: str) -> str:
    """The message of the OSError that an action ends with, before the patience of whoever waits for an outage ends."""
    start = time.monotonic()
    with pytest.raises(OSError) as caught:
        action(open_store(place))
    assert time.monotonic() - start < 30
    message = str(caught.value)
    assert "\n" not in message and message.startswith(place) and len(message) < 300
    assert message.endswith("; check the URL, and the endpoint and credentials in the environment")
    return message


@pytest.mark.parametrize("action", ACTIONS)
def test_wrong_credentials(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering((403, _DENIED)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert ": No such key id.;" in one_line(ACTIONS[action], "s3://bucket/x")


@pytest.mark.parametrize("action", [a for a in ACTIONS if a != "remove"])
def test_missing_bucket(action: str) -> None:
    assert "The specified bucket does not exist" in one_line(ACTIONS[action], "s3://nowhere/x")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("action", ["sizes", "lock"])
def test_nobody_listens(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert f"{endpoint} does not answer as it should" in one_line(ACTIONS[action], "s3://bucket/x")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("action", ["read", "write"])
def test_no_answer(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(None) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert f"{endpoint} does not answer as it should" in one_line(ACTIONS[action], "s3://bucket/x")


def test_patience_is_a_minute_at_most() -> None:
    """Tries end with the first that fails after retry_timeout, and each fails after read_timeout."""
    tries, each = remote.RETRY["retry_timeout"].total_seconds(), float(str(remote.CLIENT["read_timeout"]).strip("s"))
    assert tries >= 30 and each * -(-tries // each) <= 60
    assert remote.RETRY["max_retries"] * remote.RETRY["backoff"]["init_backoff"].total_seconds() > tries


def test_short_outages_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote.CLIENT, "read_timeout", "500ms")
    for trouble in ((503, b"busy"), (500, b"oops"), None):
        with answering(trouble, trouble, (200, b"content")) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            assert open_store("s3://bucket/x").read("a") == b"content"


def test_an_outage_is_not_made_longer_by_the_lock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot write leaves its lock to die, and says what it could not write."""
    store = open_store(url)
    write = obstore.put
    with pytest.raises(OSError, match=f"{url}/a: Slow down"), store.lock():
        held = lock_object(url)

        def fails(client: object, name: str, data: object, **options: object) -> object:
            if name == "a":
                raise obstore.exceptions.GenericError("503 <Message>Slow down</Message>")
            return write(client, name, data, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(obstore, "put", fails)
        store.write("a", b"1")
    assert lock_object(url).split()[:4] == held.split()[:4]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "ftp:// is of no known kind"),
        ("memory:///x", "memory:// is of no known kind"),
        ("file:///x", "file:// is of no known kind; give a folder"),
        ("https://host/x", "https:// is of no known kind"),
        ("s3://", "Unable to recognise URL"),
        ("s3://bucket/a?b", "cannot be used; choose another name"),
        ("s3://bucket/a#b", "cannot be used; choose another name"),
        ("az://container/x", "Account must be specified"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_store(url)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(url)


def test_other_object_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    google = open_store("gs://bucket/x/")
    assert isinstance(google, RemoteStore) and isinstance(google._client, GCSStore) and google.url == "gs://bucket/x"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert open_store("az://container/x").child("y").url == "az://container/x/y"


def test_names_in_urls() -> None:
    for place in ("s3://bucket/with space/ü", "s3://bucket/a+b", "s3://bucket/trailing/"):
        open_store(place).write("a", b"1")
        assert open_store(place).sizes() == {"a": 1} == open_store(place.rstrip("/")).sizes()


class Uneven:
    """Reads as a system gives them that is interrupted: only some of the bytes, or an error for several places."""

    def __init__(self, seed: int) -> None:
        self._read, self._random = os.preadv, np.random.default_rng(seeded(seed))

    def __call__(self, file: int, places: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if self._random.random() < 0.5:
            return self._read(file, places, offset, flags)
        if len(places) > 1 and self._random.random() < 0.5:
            raise OSError(errno.EIO, "io")
        return self._read(file, [places[0][: 1 + int(self._random.integers(len(places[0]) or 1))]], offset, flags)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.tuples(st.sampled_from([0, 0, 1, 8, 100]), st.integers(2, 40), st.integers(0, 2)), max_size=60),
    most=st.integers(1, 9),
    through=st.sampled_from([0, 8, 50]),
    seed=st.integers(0, 9),
)
def test_ranges_come_to_their_places(
    tmp_path: Path, gaps: list[tuple[int, int, int]], most: int, through: int, seed: int
) -> None:
    """Whatever is between them, in whichever files and order, and however much of them one read brings."""
    data = [bytes(np.random.default_rng(seeded(n)).integers(0, 256, 10_000, dtype=np.uint8)) for n in range(3)]
    for n in range(3):
        (tmp_path / f"{n}").write_bytes(data[n])
    ends = np.cumsum([gap + length for gap, length, _ in gaps], dtype=np.int64)
    lengths, files = (np.array([g[i] for g in gaps], np.int64) for i in (1, 2))
    order = np.random.default_rng(seeded(seed)).permutation(len(gaps)) if seed else np.arange(len(gaps))
    which, offsets, lengths = files[order], (ends - lengths)[order], lengths[order]
    places = np.cumsum(lengths) - lengths
    if seed % 2:
        places = lengths.sum() - lengths - places  # the last one first
    wanted = np.zeros(lengths.sum(), np.uint8)
    for file, offset, length, place in zip(which, offsets, lengths, places, strict=True):
        wanted[place : place + length] = np.frombuffer(data[file][offset : offset + length], np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_reads, "_PIECES", most)
        patch.setattr(joined_reads, "_NOTHING", memoryview(bytearray(through)))
        for read in (os.preadv, Uneven(seed)):
            patch.setattr(os, "preadv", read)
            out = np.zeros_like(wanted)
            LocalStore(tmp_path).read_ranges(Ranges(["0", "1", "2"], which, offsets, lengths, out, places))
            assert np.array_equal(out, wanted)


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of records, whatever their order in memory: of numbers without gaps, and of byte strings with headers."""
    store, content, calls = LocalStore(tmp_path), np.random.default_rng(seeded(0)).bytes(1 << 16), list[int]()
    store.write("a", content)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *of: calls.append(len(of[1])) or read(*of))
    for gap, pieces in ((0, 64), (8, 127)):
        offsets, places = np.arange(64) * (100 + gap), np.random.default_rng(seeded(1)).permutation(64) * 100
        lengths, out = np.full(64, 100), np.zeros(6400, np.uint8)
        store.read_ranges(Ranges(["a"], np.zeros(64, np.int64), offsets, lengths, out, places))
        for offset, place in zip(offsets.tolist(), places.tolist(), strict=True):
            assert out[place : place + 100].tobytes() == content[offset : offset + 100]
        assert calls == [pieces]
        calls.clear()


@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_in_memory_is_asked_for_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Whether or not Python can ask for what is in memory alone."""
    store, content = LocalStore(tmp_path), np.random.default_rng(seeded(0)).bytes(1 << 22)
    store.write("a", content)
    file = os.open(tmp_path / "a", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    if not known:
        monkeypatch.setattr(joined_reads, "_NOWAIT", 0)
    offsets = list(range(0, 1 << 22, 40_000))[::-1]
    assert ranges(store, "a", offsets, [4000] * len(offsets)) == [content[o : o + 4000] for o in offsets]


def test_ranges_in_threads_and_children(tmp_path: Path) -> None:
    """They share open files, and no read moves the place of another one."""
    store = LocalStore(tmp_path)
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [1], [2]) == [b"12"]
    child = os.fork()
    if not child:
        os._exit(ranges(store, "ten", [3], [2]) != [b"34"])
    assert os.waitpid(child, 0)[1] == 0
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: ranges(store, "ten", [n % 10], [1]), range(200)))
    assert found == [[b"%d" % (n % 10)] for n in range(200)]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for count in (1, 2):
        with pytest.raises(OSError) as caught:
            ranges(LocalStore(tmp_path), "folder", list(range(count)), [1] * count)
        assert caught.value.filename == str(tmp_path / "folder")


def test_a_file_that_ends_within_joined_ranges_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [8, 0, 3], [2, 3, 0]) == [b"89", b"012", b""]
    for offsets, lengths in (([0, 8], [1, 3]), ([8, 10], [2, 1]), ([4, 8, 12], [4, 4, 4])):
        with pytest.raises(UserError, match="/ten ends too early; run singer cache verify"):
            ranges(store, "ten", offsets, lengths)
