"""Object stores: large objects, the lock, and what goes wrong on the way to them, in one line."""

import contextlib
import http.server
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import GCSStore
from stores import Server, give_up_soon, ranges, raw

from pipeline.storage import LOCK, RemoteStore, Store, locks, open_store, remote
from singer.errors import UserError

pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    give_up_soon(monkeypatch)


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
        while not locks.held[url].lost:
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
    assert not locks.held


def test_what_an_ended_stage_still_finds_out_does_not_stop_the_next(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage ends a stage while its thread renews the lock, which another process removes."""
    store, renew, began, goes_on = open_store(url), locks.RemoteLock.renew, threading.Event(), threading.Event()

    def late(lock: locks.RemoteLock) -> None:
        if not began.is_set():
            began.set()
            assert goes_on.wait(60)
        renew(lock)

    monkeypatch.setattr(locks.RemoteLock, "renew", late)
    with pytest.raises(OSError, match="out of reach"), store.lock():
        assert began.wait(60)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "lock"]
        raise OSError("out of reach")
    obstore.delete(raw(url), LOCK)
    with store.lock():
        goes_on.set()
        thread.join()
        store.write("a", b"1")
    assert store.sizes() == {"a": 1}


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
