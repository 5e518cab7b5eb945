"""Ranges of files, read to their places in memory with few calls of the system.

A call for each record costs the interpreter more time than the system takes to copy it, and threads then wait for the
interpreter's lock (docs/log.md). Linux takes a list of reads at once (io_submit(2)), without that lock. Elsewhere, or
where that is forbidden, ranges are read one after the other, and a process says so once.
"""

import ctypes
import errno
import os
import platform
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pipeline.runtime.progress import say
from pipeline.storage.base import too_short

# Numbers of io_setup, io_destroy, io_getevents and io_submit, for which the C library has no functions.
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
# struct iocb and struct io_event of linux/aio_abi.h on little-endian machines, as words of 64 bits:
# number, flags << 32, kind | file << 32, memory, bytes (or pieces), offset, 0, 0; number, request, result, 0.
_REQUEST, _EVENT = 8, 4
_NUMBER, _FLAGS, _KIND, _MEMORY, _COUNT, _OFFSET = range(6)
_RESULT = 2
_READ, _READ_PIECES = 0, 7
# RWF_NOWAIT reads only what is in memory. Python has the name only if the C library that it was built with has it.
_NOWAIT = 8
# All processes of a machine share some 65,536 places, and each thread that reads takes this many.
_AT_ONCE = 128
# One read fills at most this many ranges; with the gaps between them, that is the system's limit.
_PIECES = 512
# Up to about this many bytes, it costs less to read a gap and forget it than to start another read.
_NOTHING = np.empty(1 << 12, np.uint8)
# Systems may read less ahead at a time than they are asked for, but hardly less than this.
_AHEAD = 1 << 17


def read_scattered(
    files: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
    places: np.ndarray,
    path: Callable[[int], Path],
) -> None:
    """Fill out[places[i] : places[i] + lengths[i]] from offsets[i] on in the open file files[i]; all int64, out uint8.

    Ranges that follow each other closely become one read. path: returns the path of the file of range i, for messages.
    Raises UserError if a file ends too early, OSError that names it if it cannot be read.
    """
    if not len(files):
        return
    # The system writes to any address that it gets, so the places are checked first.
    assert out.dtype == np.uint8 and out.ndim == 1 and out.flags.c_contiguous and out.flags.writeable
    assert places.min() >= 0 and lengths.min() >= 0 and (places + lengths).max() <= len(out)
    gaps = offsets[1:] - offsets[:-1] - lengths[:-1]
    follows = (gaps >= 0) & (gaps <= len(_NOTHING)) & (files[1:] == files[:-1])
    follows[_PIECES - 1 :: _PIECES] = False
    reads = np.zeros((len(files), _REQUEST), np.int64)
    reads[:, _KIND] = files << 32
    reads[:, _OFFSET] = offsets
    reads[:, _MEMORY] = places + out.ctypes.data
    reads[:, _COUNT] = sizes = lengths
    first, last = np.arange(len(files)), np.arange(1, len(files) + 1)
    if follows.any():
        # Every range has two struct iovec: one for the gap before it, which may be empty, and one for its place.
        memory = np.zeros((len(files), 2, 2), np.int64)
        memory[:, 0, 0], memory[1:, 0, 1] = _NOTHING.ctypes.data, np.where(follows, gaps, 0)
        memory[:, 1, 0], memory[:, 1, 1] = reads[:, _MEMORY], lengths
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        last = np.append(first[1:], len(files))
        sizes = np.add.reduceat(memory[:, :, 1].sum(1), first)
        reads = reads[first]
        joined = last - first > 1
        reads[joined, _KIND] += _READ_PIECES
        reads[joined, _MEMORY] = memory[0, 1].ctypes.data + memory.strides[0] * first[joined]
        reads[joined, _COUNT] = 2 * (last - first)[joined] - 1

    left = np.arange(len(reads))
    with _queue() as queue:
        if queue is not None:
            # The first pass copies what is in memory. The rest is requested all at once, and then waited for.
            left = left[queue.read(reads, _NOWAIT) != sizes]
            if len(left):
                for read in left.tolist():
                    _ask(int(files[first[read]]), int(offsets[first[read]]), int(sizes[read]))
                left = left[queue.read(reads[left], 0) != sizes[left]]
    for read in left.tolist():
        for i in range(first[read], last[read]):
            _read(int(files[i]), int(offsets[i]), out[places[i] : places[i] + lengths[i]].data, path(i))


def _ask(file: int, offset: int, size: int) -> None:
    """Request that the system reads a range ahead."""
    for start in range(offset, offset + size, _AHEAD):
        with suppress(OSError):  # the read itself will fail
            os.posix_fadvise(file, start, min(_AHEAD, offset + size - start), os.POSIX_FADV_WILLNEED)


def _read(file: int, offset: int, buffer: memoryview, path: Path) -> None:
    """Fill a buffer from an offset on. Raises UserError if the file ends too early, OSError that names it."""
    while len(buffer):
        try:
            count = os.preadv(file, [buffer], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if not count:
            raise too_short(path)
        offset, buffer = offset + count, buffer[count:]


class _Queue:
    """A queue of reads in the system, for one thread of one process."""

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        """Get a queue from the system. Raises OSError if the system has none to give."""
        if sys.platform != "linux" or platform.machine() not in _CALLS:
            raise OSError(errno.ENOSYS, "io_setup")
        setup, destroy, self._wait, self._submit = _CALLS[platform.machine()]
        handle = ctypes.c_ulong(0)
        if _call(setup, at_once, ctypes.addressof(handle)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self._handle, self.process = handle.value, os.getpid()
        # The system ends a queue only when its reads have ended.
        self.close = weakref.finalize(self, _give_back, destroy, self._handle, self.process)
        self.close.atexit = False
        self._requests = np.zeros((at_once, _REQUEST), np.int64)
        self._addresses = self._requests.ctypes.data + self._requests.strides[0] * np.arange(at_once)
        self._events = np.zeros((at_once, _EVENT), np.int64)
        self._sent, self._done = self._addresses.ctypes.data, self._events.ctypes.data

    def read(self, reads: np.ndarray, flags: int) -> np.ndarray:
        """Return the bytes that each read has brought; a read has failed if that is not its size."""
        results = np.full(len(reads), -1)
        for start in range(0, len(reads), len(self._requests)):
            count = min(len(self._requests), len(reads) - start)
            self._requests[:count] = reads[start : start + count]
            self._requests[:count, _NUMBER] = np.arange(start, start + count)
            self._requests[:count, _FLAGS] = flags << 32
            # The system does not do the requests after one that it refuses.
            missing = _call(self._submit, self._handle, count, self._sent)
            if missing < count and not flags:
                _tell("io_submit", ctypes.get_errno() if missing < 0 else errno.EAGAIN)
            while missing > 0:
                done = _call(self._wait, self._handle, missing, missing, self._done, 0)
                # A signal may end the call early, but the system still writes to where these reads go.
                if done < 0 and ctypes.get_errno() != errno.EINTR:
                    raise OSError(ctypes.get_errno(), "io_getevents")
                events = self._events[: max(0, done)]
                results[events[:, _NUMBER]] = events[:, _RESULT]
                missing -= len(events)
        return results


def _give_back(destroy: int, handle: int, process: int) -> None:
    # The child of a fork has a copy of a queue's object, but not the queue.
    if process == os.getpid():
        _call(destroy, handle)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_local = threading.local()
# This is held from the first message on.
_told = threading.Lock()


def _call(number: int, *arguments: int) -> int:
    result: int = _libc.syscall(*[ctypes.c_long(n) for n in (number, *arguments)])
    return result


def _tell(call: str, error: int) -> None:
    """Say once in a process that reads are not batched, with the reason."""
    if _told.acquire(blocking=False):
        remedy = "; more are possible with a larger fs.aio-max-nr (sysctl)" if error == errno.EAGAIN else ""
        say(
            "note: features are read one range after the other, which is slower; the system gives no batched reads "
            f"({call}: {os.strerror(error)}){remedy}"
        )


@contextmanager
def _queue() -> Iterator[_Queue | None]:
    """Lend this thread's queue, or a new one; None if the system has none to give, which may change.

    While it is lent, the thread has no queue: if something interrupts a read, no later read meets what is left of it.
    """
    queue: _Queue | None = _local.__dict__.pop("queue", None)
    if queue is None or queue.process != os.getpid():
        try:
            queue = _Queue()
        except OSError as error:
            _tell("io_setup", error.errno or errno.ENOSYS)
            queue = None
    try:
        yield queue
    except BaseException:
        if queue is not None:
            queue.close()
        raise
    if queue is not None:
        _local.queue = queue
