"""A folder."""

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pipeline.logs import is_log
from pipeline.stores.base import Ranges, missing
from pipeline.stores.files import TEMPORARY, allow_open_files, is_at, write_atomic
from pipeline.stores.scattered import read_scattered
from singer.errors import UserError


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

    def read_ranges(self, ranges: Ranges) -> None:
        names, which, offsets, lengths, out, places = ranges
        needed = {n: self._open(names[n]) for n in np.unique(which).tolist()}
        files = np.zeros(len(names), np.int64)
        files[list(needed)] = [file.number for file in needed.values()]
        read_scattered(files[which], offsets, lengths, out, places, lambda i: self.path / names[which[i]])

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, *parts)
        self._forget(name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, size in self._everything(prefix) if not (name.endswith(TEMPORARY) or is_log(name))}

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
                held = is_at(file.fileno(), lock)
            except BlockingIOError:
                held = False
            if not held:
                raise UserError(f"{self.path} is being written by another run")
            try:
                # What holders that died have left:
                shutil.rmtree(self._removed, ignore_errors=True)
                for name, _ in self._everything():
                    if name.endswith(TEMPORARY):
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
                    raise missing(self.path / name) from None
            return self._files[name]

    def _forget(self, name: str) -> None:
        """The next read opens the new file; those under way finish with the old one."""
        with self._guard:
            self._files.pop(name, None)
