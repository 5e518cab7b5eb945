"""An S3 server over a network that fails in counted ways: nothing is lost, tries are bounded, errors are one line."""

import http.client
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import use_server, world_config
from obstore.store import S3Store
from stores import Server, ranges
from test_remote import fill, objects, singer

from pipeline.config import load_config
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.stages.verify import verify
from pipeline.storage import open_store, remote

Fault = str
"""pass, slow, 500, 503, short (a cut body), reset (before the server hears of it), lost (after it has answered)."""
_BUSY = (
    b"<?xml version='1.0'?>\n<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_HEADERS = ("etag", "last-modified", "content-type", "content-range", "x-amz-version-id")


class Proxy:
    """Passes requests on to a server. fault: what happens to a request, by its number from 0, method and path."""

    def __init__(self, target: str) -> None:
        self.fault: Callable[[int, str, str], Fault] = lambda *_: "pass"
        self.seen: list[tuple[str, str, Fault]] = []
        self.target = target
        guard, place = threading.Lock(), urlparse(target)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(handler) -> None:
                body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                with guard:
                    fault = self.fault(len(self.seen), handler.command, handler.path)
                    self.seen.append((handler.command, handler.path, fault))
                if fault == "reset":
                    handler.reset()
                    return
                if fault in ("500", "503"):
                    handler.answer(int(fault), {}, _BUSY)
                    return
                if fault == "slow":
                    time.sleep(0.05)
                link = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
                link.request(handler.command, handler.path, body, dict(handler.headers))
                reply = link.getresponse()
                data, headers = reply.read(), {k: v for k, v in reply.getheaders() if k.lower() in _HEADERS}
                size = reply.getheader("Content-Length")
                link.close()
                if fault == "lost":
                    handler.reset()
                    return
                handler.answer(reply.status, headers, data, size, cut=fault == "short")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

            def answer(
                self, status: int, headers: dict[str, str], data: bytes, size: str | None = None, cut: bool = False
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", size if self.command == "HEAD" and size else str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                self.rfile = self.wfile = _Nothing()  # type: ignore[assignment]

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def client(self, url: str) -> S3Store:
        """One that asks the server itself."""
        return S3Store.from_url(url, endpoint=self.target, client_options={"allow_http": True})

    def stop(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()


class _Nothing:
    closed = True

    def flush(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server.endpoint)
    use_server(server, monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setitem(remote.RETRY, "backoff", backoff)
    monkeypatch.setitem(remote.RETRY, "max_retries", 6)
    monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 30)
    yield proxy
    proxy.stop()


def every(count: int, *faults: Fault) -> Callable[[int, str, str], Fault]:
    """One fault after the other, at each so-many-th request."""
    return lambda number, *_: faults[number // count % len(faults)] if number % count == count - 1 else "pass"


some = every(3, "503", "lost", "short", "500", "reset", "slow")


@pytest.mark.parametrize("fault", ["slow", "500", "503", "short", "reset", "lost"])
def test_one_fault_does_no_harm(proxy: Proxy, fault: Fault) -> None:
    """Neither to a read nor to a write, at whichever request."""
    store = open_store(f"s3://bucket/one-{fault}")
    for number in range(2):
        proxy.seen.clear()
        proxy.fault = lambda n, *_, number=number: fault if n == number else "pass"
        store.write("a", b"0123456789")
        assert store.read("a") == b"0123456789"
        assert ranges(store, "a", [2, 7], [3, 3]) == [b"234", b"789"]
        assert store.sizes() == {"a": 10}
        store.remove("a")
        assert store.sizes() == {} and len(proxy.seen) <= 8


@pytest.mark.parametrize("fault", ["500", "503", "short", "reset", "lost"])
@pytest.mark.parametrize("step", ["POST .*uploads", "PUT .*partNumber=2", "POST .*uploadId"])
def test_a_large_write_survives(proxy: Proxy, fault: Fault, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its beginning, in its middle, and where its pieces become one."""
    monkeypatch.setattr(remote, "_PIECE", 5 * 2**20)
    store, data = open_store("s3://bucket/large"), bytes(range(256)) * (6 * 2**12)
    left = [fault]
    proxy.fault = lambda _, method, path: left.pop() if left and re.match(step, f"{method} {path}") else "pass"
    store.write("a", data)
    proxy.fault = every(2, "short", "503")
    assert store.read("a") == data and not left


def test_an_object_replaced_while_it_is_read(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never some of its old bytes and some of the new ones."""
    monkeypatch.setattr(remote, "_PIECE", 5 * 2**20)
    store = open_store("s3://bucket/replaced")
    old, new = (bytes([n]) * (6 * 2**20) for n in (1, 2))
    store.write("a", old)
    proxy.seen.clear()
    replaced = []

    def replace(number: int, *_: str) -> Fault:
        if number == 1 and not replaced:
            replaced.append(1)
            proxy.client(store.url).put("a", new, use_multipart=False)
        return "pass"

    proxy.fault = replace
    assert store.read("a") == new


def test_a_short_answer_is_never_data(proxy: Proxy) -> None:
    store = open_store("s3://bucket/short")
    store.write("a", b"0123456789")
    proxy.seen.clear()
    proxy.fault = lambda *_: "short"
    for read in (lambda: store.read("a"), lambda: ranges(store, "a", [0], [10])):
        with pytest.raises(OSError, match="s3://bucket/short/a: .*; check the URL"):
            read()
    # The client tries 7 times; what it gives up is tried 3 times.
    assert len(proxy.seen) <= 2 * 3 * 7


def test_a_cache_through_faults(
    world: Path,
    config_file: Path,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Written, interrupted by an outage, resumed and checked: the bytes of a local one."""
    local, place = tmp_path / "local", "s3://bucket/cache"
    fill(world, local)
    make = ["cache-teacher", "--config", config_file, "--shards", world / "train" / "*.tar", "--out", place]
    shards = [0]

    def outage(number: int, method: str, path: str) -> Fault:
        shards[0] += method == "PUT" and "/journal/" in path
        return "503" if shards[0] > 2 else some(number)

    proxy.fault = outage
    assert singer(monkeypatch, *make) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error")]
    assert line.startswith(f"error: {place}/") and "Please reduce your request rate" in line
    proxy.client(place).delete("writer.lock")  # as nobody renews it
    proxy.fault = some
    assert singer(monkeypatch, *make, "--resume") == 0
    assert verify(load_config(), place).whole
    proxy.fault = lambda *_: "pass"
    assert objects(place) == objects(local)


@pytest.mark.slow
def test_distillation_through_faults(world: Path, proxy: Proxy, tmp_path: Path) -> None:
    """The student of a faultless store, at one more request for each fault."""
    place = fill(world, "s3://bucket/distilled", "new", "cache.blocks=[3]")
    config = world_config(world, "refine.steps=2", "distill.epochs=1")
    found, requests = [], []
    for name, fault in (("calm", lambda *_: "pass"), ("faulty", some)):
        proxy.seen.clear()
        proxy.fault = fault
        refine(config, place, tmp_path / f"{name}-adapters")
        result = distill(config, place, tmp_path / name, tmp_path / f"{name}-adapters")
        refiner = tmp_path / f"{name}-adapters" / "refiner.safetensors"
        found.append((refiner.read_bytes(), (result.student / "model.safetensors").read_bytes(), result.loss))
        requests.append(len(proxy.seen))
    assert found[0] == found[1]
    faults = [fault for *_, fault in proxy.seen if fault not in ("pass", "slow")]
    assert len(faults) > 20 and set(faults) == {"500", "503", "short", "reset", "lost"}
    assert requests[0] < requests[1] <= requests[0] + len(faults)
