"""Ranges of files, read to their places in memory; ranges that follow each other closely become one read.

A call of the system for each small record takes the interpreter longer than the copy takes the system. The default
order of records therefore has blocks of neighbours (data/sampler.py), and a block is one call here.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.storage.base import too_short

# One read fills at most this many ranges; with the gaps between them, that is the system's limit.
_PIECES = 512
# Up to about this many bytes, it costs less to read a gap and forget it than to start another read.
_NOTHING = memoryview(bytearray(1 << 12))
# With this flag, only what is in memory is read. Without it, where Python does not know it, everything is.
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
# Systems may read less ahead at a time than they are asked for, but hardly less than this.
_AHEAD = 1 << 17


class _Read(NamedTuple):
    """Ranges `first` to `last` of a file, with the gaps between them: `size` bytes from `offset` on."""

    file: int
    offset: int
    size: int
    first: int
    last: int


def read_joined(
    files: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    out: np.ndarray,
    places: np.ndarray,
    path: Callable[[int], Path],
) -> None:
    """Fill out[places[i] : places[i] + lengths[i]] from offsets[i] on in the open file files[i]; all int64, out uint8.

    path: returns the path of the file of range i, for messages. Raises UserError if a file ends too early, OSError that
    names it if it cannot be read.
    """
    if not len(files):
        return
    gaps = offsets[1:] - offsets[:-1] - lengths[:-1]
    follows = (gaps >= 0) & (gaps <= len(_NOTHING)) & (files[1:] == files[:-1])
    follows[_PIECES - 1 :: _PIECES] = False
    first = np.flatnonzero(np.concatenate([[True], ~follows]))
    last = np.append(first[1:], len(files))
    sizes = offsets[last - 1] + lengths[last - 1] - offsets[first]
    columns = files[first], offsets[first], sizes, first, last
    reads = [_Read(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    memory, starts, ends, between = out.data, places.tolist(), (places + lengths).tolist(), gaps.tolist()

    def brought(read: _Read, flags: int) -> bool:
        """Read all ranges of a read at once; return whether they are filled."""
        # Views of memory are made one read at a time: thousands of them at once would set off the garbage collector.
        pieces = [memory[starts[read.first] : ends[read.first]]]
        for i in range(read.first + 1, read.last):
            if between[i - 1]:
                pieces.append(_NOTHING[: between[i - 1]])
            pieces.append(memory[starts[i] : ends[i]])
        try:
            return os.preadv(read.file, pieces, read.offset, flags) == read.size
        except OSError:
            return False

    # What is in memory is copied first. The rest is requested all at once, and then waited for.
    left = [read for read in reads if not brought(read, _NOWAIT)]
    for read in left if _NOWAIT else ():
        _request(read)
    for read in left:
        if not brought(read, 0):
            for i in range(read.first, read.last):
                _read(read.file, int(offsets[i]), memory[starts[i] : ends[i]], path(i))


def _request(read: _Read) -> None:
    """Request that the system reads ahead."""
    for start in range(read.offset, read.offset + read.size, _AHEAD):
        with suppress(OSError):  # the read itself will fail
            size = min(_AHEAD, read.offset + read.size - start)
            os.posix_fadvise(read.file, start, size, os.POSIX_FADV_WILLNEED)


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
