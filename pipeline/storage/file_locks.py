"""Locks of files on this machine's disks and on network file systems, also on those without flock."""

import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pipeline.runtime.logs import warn_once
from pipeline.runtime.progress import say
from pipeline.storage.atomic import is_at
from pipeline.storage.disk import existing, is_writable
from singer.errors import UserError

# What flock answers where there is none: NFS without a lock service, Lustre without -o flock, some FUSE file systems.
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# A lock file that has not been renewed for so many seconds is dead. Its holder renews it four times in that time.
SECONDS = 60.0


def flock(file: int, path: Path, wait: bool) -> bool:
    """Lock an open file. Return False if its file system has no flock, which is said once.

    wait: whether to wait for another holder. Raises BlockingIOError if there is one and this does not wait.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        warn_once(
            "flock",
            f"the file system of {path.parent} has no flock ({error.strerror}); files .NAME.holder keep other "
            f"runs out instead; after a killed run on another machine, its successor waits for {SECONDS:.0f} s",
        )
        return False
    return True


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block ends, by flock on `.NAME.lock` beside it.

    The system frees it however the process ends. Without flock, a lock file takes its place. Raises UserError if
    another run holds the folder, or see check_lockable.
    """
    check_lockable(folder)
    place = folder.resolve()
    path = place.parent / f".{place.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, place) as file:
        try:
            has_flock = flock(file.fileno(), path, wait=False)
            # The last holder removes the file, and a lock on a removed file keeps no other run out.
            held = is_at(file.fileno(), path)
        except BlockingIOError:
            held = False
        if not held:
            raise UserError(f"{folder} is being written by another run")
        try:
            if has_flock:
                yield
            else:
                with LockFile(folder):
                    yield
        finally:
            path.unlink(missing_ok=True)


def check_lockable(folder: Path) -> None:
    """Raise UserError if this user may not write beside a folder, where its lock lies."""
    place = folder.resolve()
    if not is_writable(place.parent):
        raise _closed(place)


def _closed(place: Path) -> UserError:
    """Return the error for a folder beside which nothing can be written."""
    above = existing(place.parent)
    if place.is_dir() and is_writable(place):  # as a volume of a container
        return UserError(
            f"{above} cannot be written to, and the lock of {place} lies there; give a folder inside it, such as "
            f"{place / 'run'}"
        )
    return UserError(f"{place}: {above} cannot be written to; change its permissions, or give another folder")


def _opened(path: Path, place: Path) -> TextIO:
    """Open the lock file beside a folder. Raises UserError if this user may not."""
    try:
        return path.open("w")
    except OSError as error:
        # A root whose rights a network file system takes away is not told so before.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        if not path.exists():
            raise _closed(place) from None
        raise UserError(f"{path} is the lock of another user's run; remove it, or give another folder") from None


# The lock files of running stages, by their folders.
held: dict[Path, "LockFile"] = {}


def check(path: Path) -> None:
    """Raise UserError if this process has lost the lock of a folder, or of one above it."""
    for folder, lock in tuple(held.items()):
        if lock.lost and (folder == path or folder in path.parents):
            raise UserError(
                f"{folder} has been taken over by another run, because this one did not renew its lock file for "
                f"{SECONDS:.0f} s; continue with --resume when the other run has ended"
            )


class LockFile:
    """`with LockFile(folder)`: a lock that needs no more than a file that only one process can create.

    The file `.NAME.holder` beside the folder names its holder, which renews the file's time while it lives. lost:
    another run has taken it. Raises UserError if another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        place = folder.resolve()
        self._folder, self._path = folder, place.parent / f".{place.name}.holder"
        self._own = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._end, self.lost = threading.Event(), False

    def __enter__(self) -> "LockFile":
        if not self._create():
            self._remove_of_the_dead()
            created = self._create()
            time.sleep(SECONDS / 60)  # another run that found the same dead holder may remove what was just created
            if not created or self._content() != self._own:
                raise UserError(f"{self._folder} is being written by another run")
        held[self._folder] = self
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        del held[self._folder]
        if self._content() == self._own:
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the file. Return False if there is one."""
        try:
            with self._path.open("x") as file:
                file.write(self._own)
        except FileExistsError:
            return False
        return True

    def _remove_of_the_dead(self) -> None:
        """Remove the file of a holder that has died. Raises UserError if it lives."""
        holder, stamp = self._content(), self._stamp()
        host, _, rest = holder.partition(" ")
        process = rest.partition(" ")[0]
        if host != socket.gethostname() or _is_running(process):
            run = f"{host or 'another machine'} process {process or 'unknown'}"
            say(f"{self._folder} is locked by {run}; watching for {SECONDS:.0f} s whether that run is alive")
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and self._stamp() is not None:
                if self._stamp() != stamp:
                    raise UserError(f"{self._folder} is being written by another run ({run})")
                time.sleep(SECONDS / 60)
        if self._content() == holder:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._end.wait(SECONDS / 4):
            with suppress(OSError):
                if self._content() == self._own:
                    os.utime(self._path)
                else:
                    self.lost = True
                    return

    def _content(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _stamp(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return None


def _is_running(process: str) -> bool:
    """Return whether there is a process of this number on this machine."""
    return Path("/proc", process or "0").exists()
