"""Files that stay open between reads. All readers of this process share one pool, which bounds how many are open."""

import errno
import os
import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

# This is more than the number of shards of ImageNet-1k. The user's limit may allow fewer.
_MOST = 8192
# The pool takes this share of the user's soft limit; the rest is for sockets, files that are written, and libraries.
_SHARE = 0.5


class _Descriptor:
    """A file's place in the pool. number: -1 while closed; stamp: (bytes, time of change in ns) when it was opened."""

    __slots__ = ("number", "opening", "readers", "stamp")

    def __init__(self) -> None:
        self.number, self.stamp, self.readers = -1, (0, 0), 0
        self.opening = threading.Lock()


class Pool:
    """Keeps at most `most` files open. It closes the files that were unused for longest, and none that is being read.

    most: the default is half of the soft limit that the process has at first use. The limit is never raised.
    """

    def __init__(self, most: int | None = None) -> None:
        self._given = most
        # The files that are open or being opened, in the order of their last use.
        self._places: OrderedDict[_Descriptor, None] = OrderedDict()
        # No code refers to these files any more.
        self._abandoned: deque[_Descriptor] = deque()
        self.after_fork()

    @cached_property
    def most(self) -> int:
        """Return how many files may be open."""
        if self._given is not None:
            return self._given
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, int(soft * _SHARE)))

    @property
    def size(self) -> int:
        """Return how many files are open or being opened."""
        return len(self._places)

    @property
    def group(self) -> int:
        """Return how many files one user may hold: a quarter, so that several threads can hold theirs at a time."""
        return max(1, self.most // 4)

    def after_fork(self) -> None:
        """Free what other threads of the parent used or locked, because these threads are not in the child.

        Descriptors are copies: closing one here closes none of the parent. Every read gives its position.
        """
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        # Files in use, counted once for each use.
        self.uses = 0
        for file in list(self._places):
            file.readers, file.opening = 0, threading.Lock()
            if file.number < 0:
                del self._places[file]

    def acquire(self, files: "Sequence[OpenFile]") -> list[int]:
        """Return the descriptors of the files, open until `release`. Wait while others use too many.

        Raises OSError that names a file that cannot be opened; then no file is held.
        """
        with self._lock:
            while self.uses + len(files) > self.most:
                self._released.wait()
            self.uses += len(files)
            self._close_abandoned()
            for file in files:
                place = file.place
                # At least one place is idle, because there are no more uses than places.
                if place not in self._places and self.size >= self.most:
                    self._close_idle()
                self._places[place] = None
                self._places.move_to_end(place)
                place.readers += 1
        try:
            for file in files:
                if file.place.number < 0:
                    self._open(file)
        except BaseException:
            self.release(files)
            raise
        return [file.place.number for file in files]

    def release(self, files: "Sequence[OpenFile]") -> None:
        """Allow the pool to close the files."""
        with self._lock:
            self.uses -= len(files)
            for file in files:
                place = file.place
                place.readers -= 1
                if place.number < 0 and not place.readers:  # it was not opened
                    del self._places[place]
            self._released.notify_all()

    def abandon(self, place: _Descriptor) -> None:
        """Close a file to which no code refers any more, now or at the next use of the pool.

        Garbage collection may call this at any moment, also in a thread that holds the lock.
        """
        self._abandoned.append(place)
        if self._lock.acquire(blocking=False):
            try:
                self._close_abandoned()
            finally:
                self._lock.release()

    def _close_abandoned(self) -> None:
        while self._abandoned:
            self._close(self._abandoned.popleft())

    def _close_idle(self) -> bool:
        """Close the file that was unused for longest. Return False if all are in use."""
        idle = next((place for place in self._places if not place.readers), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _close(self, place: _Descriptor) -> None:
        self._places.pop(place, None)
        number, place.number = place.number, -1
        if number >= 0:
            os.close(number)

    def _open(self, file: "OpenFile") -> None:
        """Open a file that has a place. The lock is not held, because a network's file system may take long."""
        place = file.place
        with place.opening:
            while place.number < 0:
                try:
                    number = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    # Other code in this process has taken more than its share.
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    with self._lock:
                        if not self._close_idle():
                            raise
                else:
                    found = os.fstat(number)
                    place.stamp = found.st_size, found.st_mtime_ns
                    place.number = number


shared = Pool()
os.register_at_fork(after_in_child=shared.after_fork)


class OpenFile:
    """A file that is opened when it is used, and stays open while its pool has room and code refers to it.

    It is safe to share between threads, and in a child of fork(2).
    """

    __slots__ = ("path", "place", "pool")

    def __init__(self, path: Path, pool: Pool = shared) -> None:
        self.path, self.pool, self.place = path, pool, _Descriptor()

    def __del__(self) -> None:
        self.pool.abandon(self.place)

    @property
    def stamp(self) -> tuple[int, int]:
        """Return (bytes, time of change in ns) at the time of opening; constant while the file is used."""
        return self.place.stamp


class Opened:
    """`with Opened(files) as numbers`: the descriptors of up to `group` files of one pool. It must not be nested."""

    __slots__ = ("_files", "_pool")

    def __init__(self, files: Sequence[OpenFile]) -> None:
        self._files, self._pool = files, files[0].pool

    def __enter__(self) -> list[int]:
        return self._pool.acquire(self._files)

    def __exit__(self, *_: object) -> None:
        self._pool.release(self._files)
