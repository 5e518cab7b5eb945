"""Local copies of remote objects."""

import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from pipeline.runtime.error_kinds import FULL
from pipeline.runtime.logs import warn_once
from pipeline.storage.atomic import TEMPORARY, is_at, write_durably
from pipeline.storage.base import Ranges, Store
from pipeline.storage.file_locks import flock
from pipeline.storage.local import LocalStore
from singer.errors import UserError

# A copy that somebody has read in this time is in use. Readers renew a copy's time ten times as often.
IN_USE_SECONDS = 600.0
# FOLDER/SEGMENT/SHA-256, and the same while it is being written: nothing else is ever removed.
_COPY = re.compile(rf"[0-9a-f]{{16}}/([0-9a-f]{{64}}|\.[0-9a-f]{{64}}(\.[0-9a-f]{{16}})?{re.escape(TEMPORARY)})")


class CopyRoom:
    """The bytes that all copies in the folders of `folder` may take, whichever processes make them.

    What was unused for longest is removed, but nothing that is in use: if all copies are, as in an epoch over a cache
    that is larger than its room, replacing them would fetch whole objects for single records.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Let no process count, remove or rename copies until the block ends: what is renamed might not be counted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".room.lock").open("w") as lock:
            flock(lock.fileno(), self.folder, wait=True)
            yield

    def take(self, file: int, size: int) -> bool:
        """Make room for an object and reserve it in an open, empty file of a copy; return False if there is none."""
        with self.counted(), ExitStack() as held:
            copies = (p for p in self.folder.glob("*/*") if _COPY.fullmatch(f"{p.parent.name}/{p.name}"))
            found = [(path, about) for path in copies if (about := _stat(path)) is not None]
            over = sum(about.st_size for _, about in found) + size - self.most
            now = time.time()
            removed = []
            for path, about in sorted(found, key=lambda one: one[1].st_mtime):
                if over <= 0:
                    break
                # A time in the future is that of another clock, and says nothing.
                if abs(now - about.st_mtime) < IN_USE_SECONDS or not _given_up(path, held):
                    continue
                removed.append(path)
                over -= about.st_size
            if over > 0:
                return False
            for path in removed:
                path.unlink(missing_ok=True)
            os.ftruncate(file, size)
            return True


def _stat(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file; None of what is none, or is gone."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _given_up(path: Path, held: ExitStack) -> bool:
    """Return whether no process makes this copy now: it is finished, or was left by a process that died.

    What was left is locked until `held` ends, so that nobody continues it while it is removed.
    """
    if not path.name.endswith(TEMPORARY):
        return True
    try:
        file = held.enter_context(path.open("r+b"))
        flock(file.fileno(), path, wait=False)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


class ReadThrough:
    """A store that copies large objects to a local folder when they are first needed, and reads them there.

    checksums: {name: SHA-256} of the objects; an object that does not match is refused. A copy is named by its
    checksum, so that the copy of an object that has since been replaced is never taken for the new one. If processes
    share the folder, one of them fetches an object and the others wait. room: what the copies may take, with the
    objects' sizes {name: bytes}; ranges of objects that have no room are read from the source.
    """

    def __init__(
        self,
        source: Store,
        folder: Path,
        checksums: Mapping[str, str],
        room: CopyRoom | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._source, self._local, self._checksums = source, LocalStore(folder), checksums
        self._room, self._sizes = room, sizes or {}
        # {copy: when its time was renewed}, and until when there is no room: both of time.monotonic().
        self._renewed: dict[str, float] = {}
        self._full_until = self._looked = 0.0

    @property
    def url(self) -> str:
        """Return the URL of the store that is copied."""
        return self._source.url

    def read_ranges(self, ranges: Ranges) -> None:
        """Fill ranges.out from local copies. Raises UserError if an object does not match its checksum."""
        self._let_go()
        needed, place = np.unique(ranges.which, return_inverse=True)
        copied = np.array([self._copy(ranges.names[n]) for n in needed.tolist()], bool)[place]
        local = ranges._replace(names=[self._checksums.get(n, "") for n in ranges.names])
        if copied.all():
            self._read_copies(local, ranges)
            return
        self._source.read_ranges(_some(ranges, ~copied))
        if copied.any():
            self._read_copies(_some(local, copied), _some(ranges, copied))

    def _read_copies(self, local: Ranges, ranges: Ranges) -> None:
        try:
            self._local.read_ranges(local)
        except UserError:
            # Another process may have removed a copy between the look and the read, and made it again.
            if self._room is None:
                raise
            self._source.read_ranges(ranges)

    def _copy(self, name: str) -> bool:
        """Return whether there is a copy, and make one if there is room. A copy that is used gets a new time."""
        copy = self._local.path / self._checksums[name]
        while not copy.is_file():
            if time.monotonic() < self._full_until or self._too_large(name):
                return False
            try:
                if not self._fetch(name, copy):
                    return False
            except OSError as error:
                if self._room is None or error.errno not in FULL:
                    raise
                self._give_up(self._room, "do not fit the disk, which is full")
                return False
        now = time.monotonic()
        if now - self._renewed.get(copy.name, -IN_USE_SECONDS) >= IN_USE_SECONDS / 10:
            self._renewed[copy.name] = now
            with suppress(OSError):  # removed a moment ago, or another user's
                os.utime(copy)
        return True

    def _let_go(self) -> None:
        """Close copies that other processes have removed: while they are open, their bytes are not free."""
        now = time.monotonic()
        if now - self._looked >= IN_USE_SECONDS / 10:
            self._looked = now
            for name in [name for name in list(self._renewed) if not (self._local.path / name).is_file()]:
                self._renewed.pop(name, None)
                self._local.forget(name)

    def _fetch(self, name: str, copy: Path) -> bool:
        """Copy an object, or wait until another thread or process has done so or has given up.

        Return False if there is no room for it.
        """
        copy.parent.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_name(f".{copy.name}{TEMPORARY}")
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not flock(file, copy, wait=True):
                # Each process and thread copies for itself, to a file of its own.
                os.close(file)
                unfinished.unlink(missing_ok=True)
                unfinished = copy.with_name(f".{copy.name}.{secrets.token_hex(8)}{TEMPORARY}")
                file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            elif not is_at(file, unfinished):
                return True
            try:
                os.ftruncate(file, 0)  # what a process that died has left
                if not self._has_room(file, name):
                    unfinished.unlink(missing_ok=True)
                    return False
                data = self._source.read(name)
                if hashlib.sha256(data).hexdigest() != self._checksums[name]:
                    raise UserError(f"{self.url}/{name} does not match its checksum; run singer cache verify")
                write_durably(file, copy, data)
                self._local.forget(copy.name)  # an earlier copy that was removed, and may be open
                with nullcontext() if self._room is None else self._room.counted():
                    unfinished.rename(copy)
                return True
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        finally:
            os.close(file)

    def _too_large(self, name: str) -> bool:
        """Return whether an object takes more than all copies may."""
        if self._room is None or self._sizes[name] <= self._room.most:
            return False
        # Whole megabytes, rounded up, so that the largest object fits what is advised.
        least = -(-max(self._sizes.values()) // 10**6) / 1000
        warn_once(
            "copies that are too large",
            f"one Zarr shard of {self.url} takes more than the {self._room.most / 1e9:.3g} GB of local_copy_gb; such "
            f"shards are not copied, but read from there, record by record; set local_copy_gb to {least:g} or more",
        )
        return True

    def _has_room(self, file: int, name: str) -> bool:
        if self._room is None or self._room.take(file, self._sizes[name]):
            return True
        self._give_up(self._room, "are in use")
        return False

    def _give_up(self, room: CopyRoom, why: str) -> None:
        """Copy nothing for a while, and say why."""
        self._full_until = time.monotonic() + IN_USE_SECONDS / 10
        warn_once(
            f"copies {why}",
            f"the {room.most / 1e9:.3g} GB of local copies in {room.folder} (local_copy_gb) {why}; what has no room "
            f"there is read from {self.url}, record by record",
        )


def _some(ranges: Ranges, which: np.ndarray) -> Ranges:
    """Return the ranges of a mask."""
    return ranges._replace(
        which=ranges.which[which],
        offsets=ranges.offsets[which],
        lengths=ranges.lengths[which],
        places=ranges.places[which],
    )
