"""Files that stay open between reads. All that read in this process share one pool of so many descriptors."""

import errno
import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

# More than the shards of ImageNet-1k, where the user's limit allows it.
_MOST = 8192
# Of the user's soft limit; the rest is for sockets, files that are written, and whatever libraries open.
_SHARE = 0.5


class _File:
    """An entry of the pool. number: the descriptor, -1 until it is open; leases: who uses it now."""

    __slots__ = ("failed", "leases", "name", "number")

    def __init__(self, name: tuple[int, Hashable]) -> None:
        self.name, self.number, self.failed = name, -1, False
        self.leases: set[_Lease] = set()


class _Lease:
    """What a thread uses for one read. files: all of them; own: those that it opens itself."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.files: list[_File] = []
        self.own: list[tuple[_File, Path]] = []


class Pool:
    """At most `most` open files; those longest unused are closed first, and none that somebody reads from.

    most: default: half of the soft limit that the process has at first use, which is never raised.
    """

    def __init__(self, most: int | None = None) -> None:
        self._given = most
        self._numbers = itertools.count()
        self._reset()

    def _reset(self) -> None:
        # Held by the one that waits for room; others queue up, so that small reads do not starve a large one.
        self._turn = threading.Lock()
        self._changed = threading.Condition(threading.Lock())
        # All that take a place in the order of their last use: also those that are being opened, or were forgotten.
        self._files: OrderedDict[_File, None] = OrderedDict()
        self._known: dict[tuple[int, Hashable], _File] = {}
        # Owners that are gone. Garbage is collected at any moment, also of a thread that holds the lock.
        self._orphans: deque[int] = deque()

    @cached_property
    def most(self) -> int:
        if self._given is not None:
            return self._given
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, int(soft * _SHARE)))

    @property
    def group(self) -> int:
        """How many files one lease may have: several threads find room for theirs at the same time."""
        return max(1, self.most // 4)

    def owner(self) -> int:
        """A number under which files are known. The same file under another one is another entry."""
        return next(self._numbers)

    @contextmanager
    def lease(self, owner: int, keys: Sequence[Key], path: Callable[[Key], Path]) -> Iterator[list[int]]:
        """The descriptors of up to `group` files, open until the `with` block ends. No lease may be taken within one.

        path: of a key. Raises OSError naming the file that cannot be opened.
        """
        assert len(keys) <= self.group
        lease = _Lease()
        try:
            while not self._take(lease, owner, keys, path):
                self._release(lease)  # somebody else was to open a file, and could not
            yield [file.number for file in lease.files]
        finally:
            self._release(lease)

    def _take(self, lease: _Lease, owner: int, keys: Sequence[Key], path: Callable[[Key], Path]) -> bool:
        """Have the lease hold the files, all open; False if another thread was to open one and failed."""
        with self._changed:
            there = all((owner, key) in self._known for key in keys)
            if there:
                self._enter(lease, owner, keys, path)
        if not there:
            with self._turn, self._changed:
                self._changed.wait_for(lambda: self._room(owner, keys))
                self._enter(lease, owner, keys, path)
        # Without the lock: a network's file system may take its time.
        for file, place in lease.own:
            number = self._open(place)
            with self._changed:
                file.number = number
                self._changed.notify_all()
        if any(file.number < 0 for file in lease.files):
            with self._changed:
                self._changed.wait_for(lambda: all(file.number >= 0 or file.failed for file in lease.files))
        return not any(file.failed for file in lease.files)

    def _room(self, owner: int, keys: Sequence[Key]) -> bool:
        """Whether there is room for the files that are not there, after others were closed for them."""
        for key in keys:
            if (file := self._known.get((owner, key))) is not None:
                self._files.move_to_end(file)
        while len(self._files) + sum((owner, key) not in self._known for key in keys) > self.most:
            if not self._close_idle():
                return False
        return True

    def _enter(self, lease: _Lease, owner: int, keys: Sequence[Key], path: Callable[[Key], Path]) -> None:
        for key in keys:
            file = self._known.get((owner, key))
            if file is None:
                file = _File((owner, key))
                lease.own.append((file, path(key)))
            # In this order, an interruption at any place leaves what _release puts right.
            lease.files.append(file)
            file.leases.add(lease)
            self._files[file] = None
            self._files.move_to_end(file)
            self._known[file.name] = file

    def _open(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                # Others in this process have taken more than their share.
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                with self._changed:
                    if not self._close_idle():
                        raise

    def _close_idle(self) -> bool:
        """Close the file that nobody has used for longest; False if all are in use."""
        idle = next((file for file in self._files if not file.leases), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _close(self, file: _File) -> None:
        self._files.pop(file, None)
        if self._known.get(file.name) is file:
            del self._known[file.name]
        number, file.number = file.number, -1
        if number >= 0:
            os.close(number)

    def _release(self, lease: _Lease) -> None:
        with self._changed:
            for file, _ in lease.own:
                if file.number < 0:
                    # Whoever waits for it tries itself.
                    file.failed = True
                    if self._known.get(file.name) is file:
                        del self._known[file.name]
            for file in lease.files:
                file.leases.discard(lease)
                if not file.leases and self._known.get(file.name) is not file:
                    self._close(file)
            lease.files.clear()
            lease.own.clear()
            self._bury()
            self._changed.notify_all()

    def forget(self, owner: int, key: Hashable) -> None:
        """The next read opens the file that is there then; those under way finish with this one."""
        with self._changed:
            file = self._known.pop((owner, key), None)
            if file is not None and not file.leases:
                self._close(file)
                self._changed.notify_all()

    def abandon(self, owner: int) -> None:
        """Forget all files of an owner."""
        self._orphans.append(owner)
        # Where the lock is held, its holder or the next one does it.
        if self._changed.acquire(blocking=False):
            try:
                self._bury()
                self._changed.notify_all()
            finally:
                self._changed.release()

    def _bury(self) -> None:
        gone = set()
        while self._orphans:
            gone.add(self._orphans.popleft())
        for name in [name for name in self._known if name[0] in gone] if gone else ():
            file = self._known.pop(name)
            if not file.leases:
                self._close(file)

    def after_fork(self) -> None:
        """Of the parent's threads only the one that forked is here; what the others used is idle, their locks are not.

        Descriptors are copies: to close one here closes none of the parent. Positions are given with each read.
        """
        files, known, here = self._files, self._known, threading.get_ident()
        orphans = self._orphans
        self._reset()
        self._orphans.extend(orphans)
        for file in list(files):
            file.leases = {lease for lease in file.leases if lease.thread == here}
            if file.number >= 0:
                self._files[file] = None
                if known.get(file.name) is file:
                    self._known[file.name] = file
                elif not file.leases:
                    self._close(file)


_pool = Pool()
os.register_at_fork(after_in_child=_pool.after_fork)


class OpenFiles(Generic[Key]):
    """The files of one owner, such as a store: opened when they are read, and closed when others need their place.

    path: of a key, under which a file is asked for. Safe to share between threads, and in a child of fork(2).
    """

    def __init__(self, path: Callable[[Key], Path], pool: Pool = _pool) -> None:
        self._path, self._pool, self._owner = path, pool, pool.owner()
        weakref.finalize(self, pool.abandon, self._owner).atexit = False

    @property
    def group(self) -> int:
        """How many may be used at once."""
        return self._pool.group

    def use(self, keys: Sequence[Key]) -> AbstractContextManager[list[int]]:
        return self._pool.lease(self._owner, keys, self._path)

    def forget(self, key: Key) -> None:
        """The next read opens the file that is there then; those under way finish with the old one."""
        self._pool.forget(self._owner, key)

    def close(self) -> None:
        """Forget all."""
        self._pool.abandon(self._owner)
