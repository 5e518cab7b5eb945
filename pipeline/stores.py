"""Where a cache lies: a folder, or a prefix in an object store (s3://, gs://, az://), behind one small interface.

Objects are written whole and appear all at once; they are read whole or by byte ranges. An object store is reached
through obstore, which takes its credentials and endpoint from the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS ...).
"""

import fcntl
import hashlib
import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

Place = Path | str
LOCK = "writer.lock"
# A remote lock whose holder has not renewed it for so long is dead.
_LOCK_SECONDS = 120.0
_OTHER_FILES = 256
_TEMPORARY = ".singer-tmp"


class Store(Protocol):
    """Objects by name, such as `journal/000001.json`."""

    @property
    def url(self) -> str: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        ...

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        """Fill every buffer from its offset in the object. Raises ValueError if the object ends too early."""
        ...

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Durable and all or nothing, also after a crash."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """{name: bytes} of all objects whose name begins with the folder `prefix`."""
        ...

    def remove(self, name: str) -> None:
        """Does nothing if there is no such object."""
        ...

    def clear(self) -> None:
        """Remove everything."""
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
    """The store at a path or URL. Raises ValueError for a URL that obstore does not know."""
    return RemoteStore(str(place)) if is_remote(place) else LocalStore(Path(place))


class LocalStore:
    """A folder. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._files: dict[str, int] = {}

    @property
    def url(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        file = self._descriptor(name)
        for offset, buffer in zip(offsets, buffers, strict=True):
            while len(buffer):
                count = os.preadv(file, (buffer,), offset)
                if not count:
                    raise ValueError(f"{self.path / name} ends too early; run singer cache verify")
                offset, buffer = offset + count, buffer[count:]

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, *parts)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        folders = [str(self.path / prefix)]
        start = len(str(self.path)) + 1
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            found[entry.path[start:]] = entry.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        if self.path.exists():
            # Away in one step: a half-removed folder could not be told from a stranger's.
            removed = self.path.parent / f".{self.path.name}.removed.{os.getpid()}"
            self.path.rename(removed)
            shutil.rmtree(removed)

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
                held = lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino
            except BlockingIOError:
                held = False
            if not held:
                raise ValueError(f"{self.path} is being written by another run")
            try:
                for name in self.sizes():
                    if name.endswith(_TEMPORARY):  # of a holder that died
                        self.remove(name)
                yield
            finally:
                lock.unlink(missing_ok=True)

    def _descriptor(self, name: str) -> int:
        with self._guard:
            if name not in self._files:
                allow_open_files(len(self._files) + 1)
                try:
                    self._files[name] = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise ValueError(f"{self.path / name} is missing; run singer cache verify") from None
            return self._files[name]

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class RemoteStore:
    """A prefix of an object store."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with _as_os_error(url):
            self._store = from_url(self._url)

    @property
    def url(self) -> str:
        return self._url

    def read(self, name: str) -> bytes:
        with _as_os_error(f"{self._url}/{name}"):
            return bytes(obstore.get(self._store, name).bytes())

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        place = f"{self._url}/{name}"
        with _as_os_error(place):
            found = obstore.get_ranges(self._store, name, starts=offsets, lengths=[len(b) for b in buffers])
        for buffer, data in zip(buffers, found, strict=True):
            if len(data) != len(buffer):
                raise ValueError(f"{place} ends too early; run singer cache verify")
            buffer[:] = memoryview(data)

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        with _as_os_error(f"{self._url}/{name}"):
            obstore.put(self._store, name, b"".join(parts))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with _as_os_error(self._url):
            batches = obstore.list(self._store, prefix=prefix or None)
            return {entry["path"]: entry["size"] for batch in batches for entry in batch}

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), _as_os_error(f"{self._url}/{name}"):
            obstore.delete(self._store, name)

    def clear(self) -> None:
        # The lock stays: whoever clears holds it.
        for name in self.sizes():
            if name != LOCK:
                self.remove(name)

    def child(self, name: str) -> "RemoteStore":
        return RemoteStore(f"{self._url}/{name}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An object created by nobody else, renewed while it is held. One that is no longer renewed is dead."""
        holder = f"{socket.gethostname()} process {os.getpid()}".encode()
        with _as_os_error(self._url):
            self._break_dead_lock()
            try:
                obstore.put(self._store, LOCK, holder, mode="create")
            except AlreadyExistsError:
                other = self.read(LOCK).decode(errors="replace")
                raise ValueError(
                    f"{self._url} is being written by another run ({other}); "
                    f"if that is dead, try again in {_LOCK_SECONDS:.0f} s"
                ) from None
        released = threading.Event()

        def renew() -> None:
            while not released.wait(_LOCK_SECONDS / 4):
                with suppress(BaseError):  # the next renewal may succeed
                    obstore.put(self._store, LOCK, holder)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            released.set()
            thread.join()
            self.remove(LOCK)

    def _break_dead_lock(self) -> None:
        try:
            renewed = obstore.head(self._store, LOCK)["last_modified"].timestamp()
        except NotFoundError:
            return
        if time.time() - renewed > _LOCK_SECONDS:
            self.remove(LOCK)


class ReadThrough:
    """A store whose large objects are copied to a local folder when they are first needed, and read from there.

    checksums: {name: SHA-256} of the objects to copy; a copy that does not match is refused. Everything else is read
    from `source`.
    """

    def __init__(self, source: Store, folder: Path, checksums: Mapping[str, str]) -> None:
        self._source, self._local, self._checksums = source, LocalStore(folder), checksums
        self._guard = threading.Lock()
        self._pending: dict[str, threading.Lock] = {}

    @property
    def url(self) -> str:
        return self._source.url

    def read(self, name: str) -> bytes:
        return self._source.read(name)

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None:
        with self._guard:
            copying = self._pending.setdefault(name, threading.Lock())
        with copying:
            if not (self._local.path / name).is_file():
                data = self._source.read(name)
                if hashlib.sha256(data).hexdigest() != self._checksums[name]:
                    raise ValueError(f"{self.url}/{name} does not match its checksum; run singer cache verify")
                self._local.write(name, data)
        self._local.read_ranges(name, offsets, buffers)


@contextmanager
def _as_os_error(place: str) -> Iterator[None]:
    """obstore's errors span many lines and name its own internals."""
    try:
        yield
    except NotFoundError:
        raise FileNotFoundError(2, "no such object", place) from None
    except BaseError as error:
        raise OSError(f"{place}: {str(error).strip().splitlines()[0]}") from None


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Durable and all or nothing: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files to what `count` shards need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(f"{count} shards are more than the {hard} files that this system lets a process open")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, min(2 * soft, hard)), hard))
