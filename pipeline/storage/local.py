"""The store in a folder."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.runtime.logs import is_log
from pipeline.storage.atomic import TEMPORARY, write_atomic
from pipeline.storage.base import Ranges, missing
from pipeline.storage.file_locks import check, exclusive
from pipeline.storage.joined_reads import read_joined
from pipeline.storage.open_files import Opened, OpenFile, Pool, shared


class LocalStore:
    """A folder. Files that are read by ranges stay open, if there is room, until this very store replaces them."""

    def __init__(self, path: Path, pool: Pool = shared) -> None:
        self.path, self._pool = path, pool
        self._files: dict[str, OpenFile] = {}

    @property
    def url(self) -> str:
        """Return the path of the folder."""
        return str(self.path)

    def read(self, name: str) -> bytes:
        """Return a whole file. Raises FileNotFoundError if there is no such file."""
        try:
            return (self.path / name).read_bytes()
        except (NotADirectoryError, IsADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, str(self.path / name)) from None

    def read_ranges(self, ranges: Ranges) -> None:
        """Fill ranges.out. Raises UserError if a file is missing or too short."""
        names, which, offsets, lengths, out, places = ranges
        needed, files = np.unique(which).tolist(), np.zeros(len(names), np.int64)
        for start in range(0, len(needed), self._pool.group):
            # So few files that all of them may be open.
            group = needed[start : start + self._pool.group]
            own = slice(None) if len(group) == len(needed) else (which >= group[0]) & (which <= group[-1])
            numbers = which[own]
            path = partial(self._path, names, numbers)
            try:
                with Opened([self._file(names[n]) for n in group]) as opened:
                    files[group] = opened
                    read_joined(files[numbers], offsets[own], lengths[own], out, places[own], path)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise missing(error.filename) from None

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a file durably, all or nothing."""
        path = self.path / name
        check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, *parts)
        self._files.pop(name, None)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name: bytes} of the files below the folder `prefix`, without logs and unfinished files."""
        return {name: size for name, size in self._everything(prefix) if not (name.endswith(TEMPORARY) or is_log(name))}

    def remove(self, name: str) -> None:
        """Remove a file; do nothing if there is none."""
        (self.path / name).unlink(missing_ok=True)
        self._files.pop(name, None)

    def forget(self, name: str) -> None:
        """Close a file, which stays where it is: it has been removed or replaced by others."""
        self._files.pop(name, None)

    def clear(self, last: str = "") -> None:
        """Remove the folder in one step. A link to it stays, and so does a mount point, of which `last` goes last."""
        if self.path.exists():
            # It is renamed first: a folder that is half removed might look as if singer had not written it.
            folder = self.path.resolve()
            try:
                folder.rename(self._removed)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EXDEV):
                    raise
                for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == last):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            else:
                if self.path.is_symlink():
                    folder.mkdir()
                shutil.rmtree(self._removed)
        self._files.clear()

    def child(self, name: str) -> "LocalStore":
        """Return the store in the subfolder `name`."""
        return LocalStore(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder until the block ends, see file_locks.exclusive.

        Raises UserError if another run holds it.
        """
        with exclusive(self.path):
            # Remove what holders that died have left.
            shutil.rmtree(self._removed, ignore_errors=True)
            if self.path.is_symlink():
                self.path.resolve().mkdir(parents=True, exist_ok=True)
            for name, _ in self._everything():
                if name.endswith(TEMPORARY):
                    self.remove(name)
            yield

    @property
    def _removed(self) -> Path:
        folder = self.path.resolve()
        return folder.parent / f".{folder.name}.removed"

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

    def _path(self, names: Sequence[str], numbers: np.ndarray, row: int) -> Path:
        """Return the path of the file of a range, for messages."""
        return self.path / names[int(numbers[row])]

    def _file(self, name: str) -> OpenFile:
        return self._files.get(name) or self._files.setdefault(name, OpenFile(self.path / name, self._pool))
