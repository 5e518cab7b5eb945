"""The speed of the disk: sustained synced writes, and reads of files that memory does not hold."""

import os
import time
from collections.abc import Generator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from pipeline.data import Images, files_of
from pipeline.planning.rates import REPEATS, Rate, not_measured, rate_of
from pipeline.storage import Store

MB = 2**20
# If the second half of the bytes has less than this share of the first half's rate, the disk is still slowing down.
_SETTLED = 0.75
_MOST_REMOTE_BYTES = 2 * 2**30
_FILES_WRITTEN = 12


def write_to_disk(store: Store, whole: int, room: int | None, seconds: float, file_bytes: int) -> tuple[Rate, int]:
    """Write synced files as cache-teacher does; return the sustained rate in bytes a second, and the bytes written.

    The files stay there. Their bytes are at most those of the whole cache, and at most a tenth of `room`, the free
    bytes; room is None for an object store. file_bytes: the size of one file. A drive's own cache takes the first
    gigabytes faster, so the rate is that of the second half.
    """
    most = min(whole, _MOST_REMOTE_BYTES if room is None else room // 10)
    size = max(1, min(file_bytes, most // _FILES_WRITTEN))
    # Random content, which a disk can neither compress nor deduplicate.
    noise = memoryview(np.random.default_rng(0).bytes(size))
    repeats: list[tuple[float, float]] = []
    first = time.perf_counter()
    while len(repeats) < 4 or (
        len(repeats) * size < most and (time.perf_counter() - first < seconds or len(repeats) < 2 * REPEATS)
    ):
        cut = 4099 * len(repeats) % size
        start = time.perf_counter()
        store.write(f"written/{len(repeats):06d}", noise[cut:], noise[:cut])
        repeats.append((size, time.perf_counter() - start))
    return sustained(repeats, whole), len(repeats) * size


def sustained(files: Sequence[tuple[float, float]], whole: int) -> Rate:
    """Return the rate of the second half of files, (bytes, seconds) each, that were written one after the other.

    It is not measured if the rate was still falling, unless all of the cache's bytes (`whole`) were written.
    """
    half = len(files) // 2

    def together(some: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return sum(b for b, _ in some), sum(s for _, s in some)

    early, late = together(files[:half]), together(files[half:])
    written = early[0] + late[0]
    if written < whole and late[0] / late[1] < _SETTLED * early[0] / early[1]:
        return not_measured(f"the disk was still slowing down after {written / 1e9:.3g} GB; use more --seconds")
    middle = half + (len(files) - half) // 2
    extent = "" if written >= whole else f" on the first {written / 1e9:.3g} of {whole / 1e9:.3g} GB"
    return Rate.of([together(files[half:middle]), together(files[middle:])], f"measured{extent}")


def read_images(images: Images, seconds: float) -> Rate:
    """Return the images a second that are read in their order, from the disk and not from memory."""

    def bytes_read() -> Generator[int, None, None]:
        for path in cycle(list(files_of(images))):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := file.read(MB):
                    yield len(piece)

    return rate_of(bytes_read(), seconds).scaled(len(images) / max(1, sum(images.container_sizes)))


def forget_files(folder: Path) -> None:
    """Drop the files below a folder from the system's memory, so that they are read from the disk again."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
