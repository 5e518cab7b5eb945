"""A prefix in an object store (s3://, gs://, az://), reached through obstore.

obstore takes credentials and endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS ...).
"""

import re
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import from_url

from pipeline.runtime.logs import is_log
from pipeline.storage import locks
from pipeline.storage.base import LOCK, Ranges, missing, too_short
from pipeline.storage.spans import Span, neighbours
from singer.errors import UserError

if TYPE_CHECKING:  # obstore has no such names at run time
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

Result = TypeVar("Result")

_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
# Larger objects travel in pieces of this many bytes, several at once: none takes long, and a lost one costs little.
_PIECE = 8 * 2**20
_PIECES_AT_ONCE = 6
# Training survives shorter outages. A dead endpoint fails after 40 s, one that accepts but never answers after 60 s.
RETRY: "RetryConfig" = {
    "retry_timeout": timedelta(seconds=40),
    "max_retries": 1000,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
# These tries are for failures that the client's own retries do not fix: an object that is replaced while its pieces
# come, a list or an error that is cut off, a removal during which the connection is lost, and an upload that the store
# no longer knows, because it completed it (the answer was lost) or gave it up.
_TRIES = 3
_PASSING = re.compile("response body error|<Code>NoSuchUpload</Code>")
# Plain HTTP is used only if the environment names such an endpoint.
CLIENT: "ClientConfig" = {
    "connect_timeout": "5s",
    "read_timeout": "30s",
    "timeout": "60s",
    "allow_http": True,
    "pool_max_idle_per_host": "16",
}


@cache
def _requests_at_once() -> threading.BoundedSemaphore:
    """Limit requests in the whole process to an eighth of the soft limit, as each request takes a descriptor."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return threading.BoundedSemaphore(64 if soft == resource.RLIM_INFINITY else max(1, min(64, soft // 8)))


class RemoteStore:
    """A prefix of an object store; child stores share its client."""

    def __init__(self, url: str, client: "ObjectStore", prefix: str = "") -> None:
        """Hold a client and a prefix of names, which is empty or ends with a slash. url: for messages."""
        self._url, self._client, self._prefix = url, client, prefix

    @classmethod
    def open(cls, url: str, also: Sequence[str] = ()) -> "RemoteStore":
        """Open the store at a URL. also: further schemes.

        Raises UserError if its kind is unknown, or the environment lacks settings.
        """
        scheme = url.partition("://")[0]
        if scheme not in (*_SCHEMES, *also):
            raise UserError(f"{url}: {scheme}:// is of no known kind; give a folder, or a URL s3://, gs:// or az://")
        if {"?", "#"} & set(url):
            raise UserError(f"{url}: a URL with ? or # cannot be used; choose another name")
        # Files to be copied may take longer than what is read here in pieces.
        client: ClientConfig = {**CLIENT, "timeout": "24h"} if also else CLIENT
        try:
            return cls(url.rstrip("/"), from_url(url, client_options=client, retry_config=RETRY))
        except (BaseError, ValueError) as error:
            raise UserError(f"{url} cannot be used: {_reason(error)}") from None

    @property
    def url(self) -> str:
        """Return the URL of the prefix."""
        return self._url

    def read(self, name: str) -> bytes:
        """Return a whole object. Raises FileNotFoundError if there is no such object."""
        return self._repeat(lambda: self._read(name), name)

    def _read(self, name: str) -> bytes:
        """Read an object, a large one in pieces of the same version."""
        found = obstore.get(self._client, self._prefix + name)
        size, version = found.meta["size"], found.meta["e_tag"]
        if size <= _PIECE:
            return bytes(found.bytes())
        del found  # unread

        def piece(start: int) -> memoryview:
            return self._range(name, start, min(start + _PIECE, size), version)

        with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
            return b"".join(pool.map(piece, range(0, size, _PIECE)))

    def _range(self, name: str, start: int, end: int, version: str | None = None) -> memoryview:
        """Return bytes `start` to `end` of an object, of a version if given. Raises UserError if it is too short."""
        options: GetOptions = {"range": (start, end)}
        if version is not None:
            options["if_match"] = version
        with _requests_at_once():
            data = memoryview(obstore.get(self._client, self._prefix + name, options=options).bytes())
        if len(data) != end - start:
            raise too_short(f"{self._url}/{name}")
        return data

    def about(self, name: str) -> "ObjectMeta":
        """Return size, version and time of an object. Raises FileNotFoundError if there is no such object."""
        return self._repeat(lambda: obstore.head(self._client, self._prefix + name), name)

    def copy(self, name: str, target: Path) -> None:
        """Copy a whole object to a local file, piece by piece. Raises FileNotFoundError if there is no such object."""

        def stream() -> None:
            found = obstore.get(self._client, self._prefix + name)
            with target.open("wb") as file:
                for piece in found.stream(min_chunk_size=_PIECE):
                    file.write(piece)
                if file.tell() != found.meta["size"]:
                    raise OSError(f"{self._url}/{name}: the connection ended too early")

        self._repeat(stream, name)

    def read_ranges(self, ranges: Ranges) -> None:
        """Fill ranges.out. Raises UserError if an object is missing or too short."""

        def fetch(group: Sequence[Span]) -> None:
            name, start, end = group[0].name, group[0].start, max(r.end for r in group)
            data = self._repeat(lambda: self._range(name, start, end), name)
            for r in group:
                whole[r.place : r.place + r.end - r.start] = data[r.start - start : r.end - start]

        names, which, offsets, lengths, out, places = ranges
        whole = out.data
        columns = (column.tolist() for column in (which, offsets, offsets + lengths, places))
        wanted = [Span(names[n], *row) for n, *row in zip(*columns, strict=True) if row[1] > row[0]]
        with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
            try:
                list(pool.map(fetch, neighbours(wanted, _PIECE)))
            except FileNotFoundError as error:
                raise missing(error.filename) from None

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write an object, all or nothing. Raises UserError if another run has the lock."""
        locks.check(self._url)
        # When the store has all pieces of a large object, it joins them in one step.
        large = sum(map(len, parts)) > _PIECE

        def put() -> None:
            obstore.put(
                self._client,
                self._prefix + name,
                iter(parts) if large else b"".join(parts),
                use_multipart=large,
                chunk_size=_PIECE,
                max_concurrency=_PIECES_AT_ONCE,
            )

        self._repeat(put, name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name: bytes} of all objects below `prefix`, without the lock and logs."""
        return {name: size for name, size in self._everything(prefix).items() if not is_log(name)}

    def _everything(self, prefix: str = "") -> dict[str, int]:
        """Return {name: bytes} of all objects below `prefix`, with logs, without the lock."""

        def found() -> dict[str, int]:
            batches = obstore.list(self._client, prefix=self._prefix + prefix or None)
            return {entry["path"][start:]: entry["size"] for batch in batches for entry in batch}

        start = len(self._prefix)
        return {name: size for name, size in self._repeat(found).items() if name != LOCK}

    def remove(self, name: str) -> None:
        """Remove an object; do nothing if there is none."""
        with suppress(FileNotFoundError):
            self._repeat(lambda: obstore.delete(self._client, self._prefix + name), name)

    def clear(self, last: str = "") -> None:
        """Remove all objects, `last` after the others."""
        names = self._everything()
        if others := [self._prefix + name for name in names if name != last]:
            self._repeat(lambda: obstore.delete(self._client, others))
        if last in names:
            self.remove(last)

    def child(self, name: str) -> "RemoteStore":
        """Return the store of the names below `name/`."""
        return RemoteStore(f"{self._url}/{name}", self._client, f"{self._prefix}{name}/")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the object `writer.lock`, which its holder replaces by a new version again and again.

        A lock that shows no new version for a minute is dead and is taken over; no two clocks are compared. A holder
        that finds another's version has lost the lock, and can write nothing from then on. Raises UserError if another
        run holds it.
        """
        lock, released = locks.RemoteLock(self._client, self._prefix + LOCK), threading.Event()

        def renew() -> None:
            with self._one_line():
                lock.renew()
            locks.check(self._url)

        def keep() -> None:
            while not lock.lost and not released.wait(locks.SECONDS / 4):
                with suppress(UserError, OSError):  # after an outage, the next renewal may succeed
                    renew()

        def release() -> None:
            released.set()
            thread.join()
            renew()
            self.remove(LOCK)

        with self._one_line():
            lock.take(self._url)
        locks.held[self._url] = lock
        thread = threading.Thread(target=keep, name="lock", daemon=True)
        thread.start()
        try:
            yield
        except OSError:
            raise  # the store may be out of reach: another try would only delay the error, and the lock dies by itself
        except BaseException:
            with suppress(UserError, OSError):
                release()
            raise
        else:
            release()
        finally:
            released.set()
            del locks.held[self._url]

    def _repeat(self, action: Callable[[], Result], name: str = "") -> Result:
        """Repeat an action if the client's own retries do not fix its failure. Raises errors of one line."""
        with self._one_line(name):
            for _ in range(_TRIES - 1):
                try:
                    return action()
                except (BaseError, FileNotFoundError) as error:
                    if not (
                        isinstance(error, PreconditionError)
                        or locks.is_connection_lost(error)
                        or _PASSING.search(str(error))
                    ):
                        raise
            return action()

    @contextmanager
    def _one_line(self, name: str = "") -> Iterator[None]:
        """Turn obstore's errors, which have many lines and name its internals, into errors of one line."""
        place = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            if "416 Range Not Satisfiable" in str(error):
                raise too_short(place) from None
            if isinstance(error, FileNotFoundError) and not locks.is_bucket_missing(error):
                raise FileNotFoundError(2, "no such object", place) from None
            raise OSError(
                f"{place}: {_reason(error)}; check the URL, and the endpoint and credentials in the environment"
            ) from None


def _reason(error: Exception) -> str:
    """Return the server's message, or else the main part of obstore's first line."""
    text = str(error)
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if said:
        return " ".join(said[1].split())
    first = text.partition("\n")[0].partition("<?xml")[0].strip(" :")
    asked = re.search(r"Error performing [A-Z]+ (\w+://[^/ ]+)", first)
    answer = re.sub(r"^Generic \w+ error: ", "", first.rpartition(" - ")[2])
    return f"{asked[1]} does not answer as it should ({answer})" if asked else answer
