"""Where a cache lies: a folder, or a prefix in an object store (s3://, gs://, az://), behind one small interface.

Objects are written whole and appear all at once; they are read whole or by byte ranges. An object store is reached
through obstore, which takes its credentials and endpoint from the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS ...).
"""

import fcntl
import hashlib
import os
import re
import resource
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from pipeline.progress import say

if TYPE_CHECKING:  # obstore has no such names at run time
    from obstore import PutMode, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

Place = Path | str
LOCK = "writer.lock"
# A remote lock that has not been renewed for so long is dead; it is renewed four times as often.
_LOCK_SECONDS = 60.0
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
# Whatever is larger travels in pieces of so many bytes, several at once: none takes long, and a lost one costs little.
_PIECE = 8 * 2**20
_PIECES_AT_ONCE = 6
# Reading so many bytes in vain takes less time than another request.
_GAP = 2**20
# Training lives through shorter outages. A dead endpoint fails after 40 s, one that accepts but never answers after 60.
_RETRY: "RetryConfig" = {
    "retry_timeout": timedelta(seconds=40),
    "max_retries": 1000,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
# Plain HTTP is spoken only where the environment names such an endpoint.
_CLIENT: "ClientConfig" = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "60s", "allow_http": True}
_OTHER_FILES = 256
_TEMPORARY = ".singer-tmp"


class Store(Protocol):
    """Objects by name, such as `journal/000001.json`. Safe to share between threads.

    What fails outside of singer (disk, network) is an OSError that names the place in one line.
    """

    @property
    def url(self) -> str: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        ...

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Fill every buffer from its offset in the object. Raises ValueError if it is missing or ends too early."""
        ...

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Durable and all or nothing, also after a crash. Raises ValueError if the lock has gone to another run."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """{name: bytes} of all objects below the folder `prefix`; locks and unfinished objects are none."""
        ...

    def remove(self, name: str) -> None:
        """Does nothing if there is no such object."""
        ...

    def clear(self, last: str = "") -> None:
        """Remove everything; the object `last` goes last, so that what is left of an interrupted run is known by it."""
        ...

    def child(self, name: str) -> "Store":
        """The store of the names below `name/`."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Held by one writer at a time; a second one gets a ValueError."""
        ...


def is_remote(place: Place) -> bool:
    return "://" in str(place)


def open_store(place: Place) -> Store:
    """The store at a path or URL. Raises ValueError for a URL that cannot be used."""
    return RemoteStore.open(str(place)) if is_remote(place) else LocalStore(Path(place))


class _File:
    """An open file that closes when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalStore:
    """A folder. Files that are read by ranges stay open until this very store replaces or removes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._files: dict[str, _File] = {}

    @property
    def url(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, str(self.path / name)) from None

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        file = self._open(name)
        for offset, buffer in zip(offsets, buffers, strict=True):
            count = os.preadv(file.number, (buffer,), offset)
            while count < len(buffer):
                more = os.preadv(file.number, (buffer[count:],), offset + count)
                if not more:
                    raise _too_short(self.path / name)
                count += more

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, *parts)
        self._forget(name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, size in self._everything(prefix) if not name.endswith(_TEMPORARY)}

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        self._forget(name)

    def clear(self, last: str = "") -> None:
        if self.path.exists():
            # Away in one step: a half-removed folder could not be told from a stranger's.
            self.path.rename(self._removed)
            shutil.rmtree(self._removed)
        with self._guard:
            self._files.clear()

    def child(self, name: str) -> "LocalStore":
        return LocalStore(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An flock on `.NAME.lock` beside the folder; the system frees it at any kind of death."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.parent / f".{self.path.name}.lock"
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder removes the file: a lock on a removed one keeps nobody out.
                held = _is_at(file.fileno(), lock)
            except BlockingIOError:
                held = False
            if not held:
                raise ValueError(f"{self.path} is being written by another run")
            try:
                # What holders that died have left:
                shutil.rmtree(self._removed, ignore_errors=True)
                for name, _ in self._everything():
                    if name.endswith(_TEMPORARY):
                        self.remove(name)
                yield
            finally:
                lock.unlink(missing_ok=True)

    @property
    def _removed(self) -> Path:
        return self.path.parent / f".{self.path.name}.removed"

    def _everything(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folders = [str(self.path / prefix)]
        start = len(str(self.path)) + 1
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    found = list(entries)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with suppress(FileNotFoundError):  # renamed meanwhile by a writer
                        yield entry.path[start:], entry.stat().st_size

    def _open(self, name: str) -> _File:
        with self._guard:
            if name not in self._files:
                allow_open_files(len(self._files) + 1)
                try:
                    self._files[name] = _File(self.path / name)
                except (FileNotFoundError, NotADirectoryError):
                    raise _missing(self.path / name) from None
            return self._files[name]

    def _forget(self, name: str) -> None:
        """The next read opens the new file; those under way finish with the old one."""
        with self._guard:
            self._files.pop(name, None)


class RemoteStore:
    """A prefix of an object store; child stores share its client."""

    def __init__(self, url: str, client: "ObjectStore", prefix: str = "") -> None:
        """prefix: what stands ahead of names within the client, with a slash at its end; or empty."""
        self._url, self._client, self._prefix = url, client, prefix

    @classmethod
    def open(cls, url: str) -> "RemoteStore":
        """Raises ValueError if the URL is of no known kind, or if settings that it needs lack in the environment."""
        scheme = url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise ValueError(f"{url}: {scheme}:// is of no known kind; give a folder, or a URL s3://, gs:// or az://")
        if {"?", "#"} & set(url):
            raise ValueError(f"{url}: a URL with ? or # cannot be used; choose another name")
        try:
            return cls(url.rstrip("/"), from_url(url, client_options=_CLIENT, retry_config=_RETRY))
        except (BaseError, ValueError) as error:
            raise ValueError(f"{url} cannot be used: {_reason(error)}") from None

    @property
    def url(self) -> str:
        return self._url

    def read(self, name: str) -> bytes:
        key = self._prefix + name
        with self._one_line(name):
            found = obstore.get(self._client, key)
            size = found.meta["size"]
            if size <= _PIECE:
                return bytes(found.bytes())
            del found  # unread

            def piece(start: int) -> memoryview:
                return memoryview(obstore.get_range(self._client, key, start=start, end=min(start + _PIECE, size)))

            with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
                return b"".join(pool.map(piece, range(0, size, _PIECE)))

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        def fetch(group: list[tuple[int, memoryview]]) -> None:
            start, end = group[0][0], max(offset + len(buffer) for offset, buffer in group)
            data = memoryview(obstore.get_range(self._client, self._prefix + name, start=start, end=end))
            for offset, buffer in group:
                found = data[offset - start :][: len(buffer)]
                if len(found) != len(buffer):
                    raise _too_short(f"{self._url}/{name}")
                buffer[:] = found

        groups = list(_neighbours([(o, b) for o, b in zip(offsets, buffers, strict=True) if len(b)]))
        try:
            with self._one_line(name), ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
                list(pool.map(fetch, groups))
        except FileNotFoundError:
            raise _missing(f"{self._url}/{name}") from None

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        _check_lock(self._url)
        # The pieces of a large object become one in a single step of the store, when it has them all.
        large = sum(map(len, parts)) > _PIECE
        with self._one_line(name):
            obstore.put(
                self._client,
                self._prefix + name,
                iter(parts) if large else b"".join(parts),
                use_multipart=large,
                chunk_size=_PIECE,
                max_concurrency=_PIECES_AT_ONCE,
            )

    def sizes(self, prefix: str = "") -> dict[str, int]:
        start = len(self._prefix)
        with self._one_line():
            batches = obstore.list(self._client, prefix=self._prefix + prefix or None)
            found = {entry["path"][start:]: entry["size"] for batch in batches for entry in batch}
        return {name: size for name, size in found.items() if name != LOCK}

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._one_line(name):
            obstore.delete(self._client, self._prefix + name)

    def clear(self, last: str = "") -> None:
        names = self.sizes()
        if others := [self._prefix + name for name in names if name != last]:
            with self._one_line():
                obstore.delete(self._client, others)
        if last in names:
            self.remove(last)

    def child(self, name: str) -> "RemoteStore":
        return RemoteStore(f"{self._url}/{name}", self._client, f"{self._prefix}{name}/")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The object `writer.lock`, which its holder replaces by a new version again and again.

        A lock that shows no new version for a minute is dead and is taken over; no two clocks are compared. A holder
        that meets another's version has lost it, and can write nothing from then on.
        """
        lock, released = _RemoteLock(self._client, self._prefix + LOCK), threading.Event()

        def renew() -> None:
            with self._one_line():
                if not lock.renew():
                    _lost.add(self._url)
            _check_lock(self._url)

        def keep() -> None:
            while self._url not in _lost and not released.wait(_LOCK_SECONDS / 4):
                with suppress(ValueError, OSError):  # lost, or an outage: the next renewal may succeed
                    renew()

        def release() -> None:
            released.set()
            thread.join()
            renew()
            self.remove(LOCK)

        with self._one_line():
            lock.take(self._url)
        thread = threading.Thread(target=keep, name="lock", daemon=True)
        thread.start()
        try:
            yield
        except OSError:
            raise  # perhaps out of reach: rather than make the user wait for one more error, let the lock die
        except BaseException:
            with suppress(ValueError, OSError):
                release()
            raise
        else:
            release()
        finally:
            released.set()
            _lost.discard(self._url)

    @contextmanager
    def _one_line(self, name: str = "") -> Iterator[None]:
        """obstore's errors span many lines and name its own internals."""
        place = f"{self._url}/{name}" if name else self._url
        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            if "416 Range Not Satisfiable" in str(error):
                raise _too_short(place) from None
            if isinstance(error, FileNotFoundError) and not _is_bucket_missing(error):
                raise FileNotFoundError(2, "no such object", place) from None
            raise OSError(
                f"{place}: {_reason(error)}; check the URL, and the endpoint and credentials in the environment"
            ) from None


class _RemoteLock:
    """An object that only the writer of its last version replaces."""

    def __init__(self, client: "ObjectStore", key: str) -> None:
        self._client, self._key = client, key
        self._holder = f"{socket.gethostname()} process {os.getpid()}"
        self._token, self._count = secrets.token_hex(8), 0
        self._version: UpdateVersion = {}

    def take(self, place: str) -> None:
        """Raises ValueError if somebody else holds the lock."""
        if self._put("create"):
            return
        first = now = self._look()
        if first is not None:
            say(f"{place} is locked by {first[0]}; watching for {_LOCK_SECONDS:.0f} s whether that run is alive")
        end = time.monotonic() + _LOCK_SECONDS
        while now is not None and now == first and time.monotonic() < end:
            time.sleep(_LOCK_SECONDS / 60)
            now = self._look()
        if not self._put("create" if now is None or now != first else now[1]):
            raise ValueError(f"{place} is being written by another run ({(now or first or ('unknown',))[0]})")

    def renew(self) -> bool:
        """False if another run has taken the lock."""
        return self._put(self._version)

    def _put(self, mode: "PutMode") -> bool:
        # Never the same twice: stores may tell versions by their content.
        self._count += 1
        content = f"{self._holder}\n{self._token} {self._count}".encode()
        try:
            self._version = _version(obstore.put(self._client, self._key, content, mode=mode))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if _is_bucket_missing(error):
                raise
            # If the answer to a request got lost, the client's second try has met what the first one wrote.
            found = self._look(content)
            if found is None:
                return False
            self._version = found[1]
        return True

    def _look(self, content: bytes | None = None) -> "tuple[str, UpdateVersion] | None":
        """Holder and version of the lock, if there is one; with `content`, only if it is that."""
        try:
            found = obstore.get(self._client, self._key)
            data = bytes(found.bytes())
        except FileNotFoundError:
            return None
        if content not in (None, data):
            return None
        return data.decode(errors="replace").partition("\n")[0], _version(found.meta)


# URLs of the stores whose lock this process has lost. By URL, as a run opens its store more than once.
_lost: set[str] = set()


def _check_lock(url: str) -> None:
    for lost in tuple(_lost):
        if f"{url}/".startswith(f"{lost}/"):
            raise ValueError(
                f"{lost} has been taken over by another run, as this one did not reach it for {_LOCK_SECONDS:.0f} s; "
                "continue with --resume when that has ended"
            )


def _neighbours(ranges: list[tuple[int, memoryview]]) -> Iterator[list[tuple[int, memoryview]]]:
    """Ranges that one request fetches: hardly a gap between them, and no more than a piece unless one is larger."""
    # obstore's own get_ranges does the same, but panics if an object ends too early.
    group: list[tuple[int, memoryview]] = []
    end = 0
    for offset, buffer in sorted(ranges, key=lambda r: r[0]):
        if group and (offset > end + _GAP or offset + len(buffer) > group[0][0] + _PIECE):
            yield group
            group = []
        group.append((offset, buffer))
        end = offset + len(buffer)
    if group:
        yield group


def _version(result: Mapping[str, Any]) -> "UpdateVersion":
    found: UpdateVersion = {}
    if result["e_tag"] is not None:
        found["e_tag"] = result["e_tag"]
    if result["version"] is not None:
        found["version"] = result["version"]
    return found


def _is_bucket_missing(error: Exception) -> bool:
    return "<Code>NoSuchBucket</Code>" in str(error)


def _reason(error: Exception) -> str:
    """What the server says, or else the core of obstore's first line."""
    text = str(error)
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if said:
        return " ".join(said[1].split())
    first = text.partition("\n")[0].partition("<?xml")[0].strip(" :")
    asked = re.search(r"Error performing [A-Z]+ (\w+://[^/ ]+)", first)
    answer = re.sub(r"^Generic \w+ error: ", "", first.rpartition(" - ")[2])
    return f"{asked[1]} does not answer as it should ({answer})" if asked else answer


def _missing(place: Place) -> ValueError:
    return ValueError(f"{place} is missing; run singer cache verify")


def _too_short(place: Place) -> ValueError:
    return ValueError(f"{place} ends too early; run singer cache verify")


class ReadThrough:
    """A store whose large objects are copied to a local folder when they are first needed, and read from there.

    checksums: {name: SHA-256} of the objects. What does not match is refused. Copies are named by it, so that one of an
    object that has since been replaced is never taken for the new one. Of processes that share the folder, one fetches
    an object and the others wait.
    """

    def __init__(self, source: Store, folder: Path, checksums: Mapping[str, str]) -> None:
        self._source, self._local, self._checksums = source, LocalStore(folder), checksums

    @property
    def url(self) -> str:
        return self._source.url

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        copy = self._checksums[name]
        while not (self._local.path / copy).is_file():
            self._fetch(name, self._local.path / copy)
        self._local.read_ranges(copy, offsets, buffers)

    def _fetch(self, name: str, copy: Path) -> None:
        """Copy an object, or wait until another thread or process has done so or has given up."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_name(f".{copy.name}{_TEMPORARY}")
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, unfinished):
                return
            try:
                data = self._source.read(name)
                if hashlib.sha256(data).hexdigest() != self._checksums[name]:
                    raise ValueError(f"{self.url}/{name} does not match its checksum; run singer cache verify")
                os.ftruncate(file, 0)  # the rest of a process that died
                _write_durably(file, copy, data)
                unfinished.rename(copy)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        finally:
            os.close(file)


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Durable and all or nothing: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_TEMPORARY}")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_durably(file, path, *parts)
        finally:
            os.close(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_durably(file: int, path: Path, *parts: bytes | memoryview) -> None:
    """Write to a descriptor and sync. The error of a full disk names no file by itself; this one names `path`."""
    try:
        for part in parts:
            view = memoryview(part)
            while len(view):
                view = view[os.write(file, view) :]
        os.fsync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still is the one at a path."""
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files to what `count` shards need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(f"{count} shards are more than the {hard} files that this system lets a process open")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, min(2 * soft, hard)), hard))
