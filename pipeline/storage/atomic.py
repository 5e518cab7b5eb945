"""Files that are written whole or not at all."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.runtime.error_kinds import FULL

TEMPORARY = ".singer-tmp"
# What the system says of a descriptor of a file; connections fail with other numbers.
_DISK = (*FULL, errno.EFBIG, errno.EIO)


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file durably, all or nothing: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_durably(file, path, *parts)
        finally:
            os.close(file)
        _put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path; what the block writes there becomes the file, durably, if the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            _put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path) -> None:
    """Give a file its name, durably."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_durably(file: int, path: Path, *parts: bytes | memoryview) -> None:
    """Write to a descriptor and sync. Raises OSError that names `path`."""
    with naming(path):
        for part in parts:
            view = memoryview(part)
            while len(view):
                view = view[os.write(file, view) :]
        os.fsync(file)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise an error of the disk again with this path if it names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_at(file: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.fstat(file).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
