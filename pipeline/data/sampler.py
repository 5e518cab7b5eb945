"""Which records a process reads, in which order: pure functions of (seed, epoch, rank, world size, step)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeline.config import TrainingConfig

# A shuffle window of at most this many bytes is read in one piece. Up to three of them are held.
WINDOW_BYTES = 1 << 28
# By default, a window has so many blocks. Larger ones would be read hardly faster, and shuffled less well.
_BLOCKS = 512
# Windows of fewer batches would often bring neighbours into one batch, and those of fewer blocks would mix little.
_LEAST_BATCHES, _LEAST_BLOCKS = 4, 16
# About this many bytes of batches are read together, so that small batches share the interpreter's work.
PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class BatchIndices:
    """One process's part of a global batch.

    records: (n,) int64, the same n for all processes of a step; weights: (n,) float32, such that the mean over
    processes of sum(weight · loss) is the mean loss of the global batch. Records that only fill up have weight 0.
    epoch: the one in which they are read; step: the number of the global batch in the whole training.
    """

    records: np.ndarray
    weights: np.ndarray
    epoch: int = 0
    step: int = 0


def steps_per_epoch(records: int, batch: int) -> int:
    """Return the number of batches in an epoch; the last one may be smaller."""
    return -(-records // batch)


def part_size(records: int, parts: int) -> int:
    """Return the records in each of so many parts but the last; too few records make fewer parts."""
    return -(-records // parts)


def smallest_part(records: int, batch: int, world: int, parts: int) -> int:
    """Return the size of the smallest part, in records, when every process divides its batches into `parts`."""
    batches = {min(batch, records), records % batch or min(batch, records)}
    mine = {-(-whole // world) for whole in batches}
    return min(n % part_size(n, parts) or part_size(n, parts) for n in mine)


class EpochOrder:
    """The order of an epoch: every record once, the same on every process. Any stretch of it can be computed.

    block: neighbouring records that are read in one place. The order of the blocks is shuffled, and then the records
    within each `window` of the result. Only the order of the blocks takes memory. Blocks of 1, or a window that holds
    all records, are a plain shuffle.
    """

    def __init__(self, records: int, seed: int, epoch: int, block: int = 1, window: int = 1 << 14) -> None:
        self._records, self._seed, self.epoch = records, [seed, epoch], epoch
        self._block, self._window = block if window < records else 1, window
        blocks = np.arange(-(-records // self._block), dtype=np.int64)
        self._blocks = np.random.default_rng(self._seed).permutation(blocks)
        lengths = np.minimum(self._block, records - self._blocks * self._block)
        self._ends = np.cumsum(lengths)
        self._mixed: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._records

    def stretch(self, start: int, stop: int) -> np.ndarray:
        """Return the records at places start to stop of the epoch, int64."""
        stop = min(stop, self._records)
        if self._block == 1:
            return self._blocks[start:stop]
        pieces = [self._blocks[:0]]
        for number in range(start // self._window, -(-stop // self._window)):
            first = number * self._window
            pieces.append(self._mix(number)[max(0, start - first) : stop - first])
        return np.concatenate(pieces)

    def _mix(self, number: int) -> np.ndarray:
        if self._mixed is None or self._mixed[0] != number:
            start, stop = number * self._window, min((number + 1) * self._window, self._records)
            places = np.arange(start, stop)
            block = np.searchsorted(self._ends, places, side="right")
            records = (self._blocks[block] + 1) * self._block - (self._ends[block] - places)
            # The last block may be shorter than the others: it ends with the records.
            records -= np.maximum(0, (self._blocks[block] + 1) * self._block - self._records)
            self._mixed = number, np.random.default_rng([*self._seed, number]).permutation(records)
        return self._mixed[1]


def batch_indices(order: EpochOrder, step: int, batch: int, rank: int, world: int) -> BatchIndices:
    """Return the part of global batch `step` that process `rank` of `world` computes.

    The global batch does not depend on `world`. The last one of an epoch may be smaller; nothing is dropped or
    counted twice.
    """
    whole = order.stretch(step * batch, (step + 1) * batch)
    size = -(-len(whole) // world)
    mine = whole[rank * size : (rank + 1) * size]
    filling = np.repeat(whole[:1], size - len(mine))
    weights = np.concatenate([np.full(len(mine), world / len(whole)), np.zeros(len(filling))])
    return BatchIndices(np.concatenate([mine, filling]), weights.astype(np.float32), order.epoch)


class Shuffle(NamedTuple):
    """How epochs are shuffled, see EpochOrder; whole: whether a window is read in one piece."""

    block: int
    window: int
    whole: bool


def shuffle_of(settings: TrainingConfig, records: int, record_bytes: int) -> Shuffle:
    """Return how epochs are shuffled: a pure function of the settings and the caches, as a run that resumes needs it.

    By default, a window has as many records as WINDOW_BYTES hold, and a block a part of them. If a block would be one
    record, or a window only some batches, the shuffle is plain. So it is if a window holds all records, which are then
    read in one piece. The window of a block that is given may be larger, so that it mixes this block with others.
    """
    block, window, batch = settings.read_block, settings.shuffle_window, settings.batch_size
    if window is None:
        window = max(1, WINDOW_BYTES // record_bytes)
        if block is not None:
            window = max(window, _LEAST_BATCHES * batch, _LEAST_BLOCKS * block)
        elif window < min(records, _LEAST_BATCHES * batch):
            block = 1
        if window < records and block != 1:
            # Whole batches, so that all windows have one size, and use memory of one size again.
            window = max(1, window // batch) * batch
    block = block or max(1, window // _BLOCKS)
    window = min(window, records)
    return Shuffle(block, window, block > 1 and window * record_bytes <= WINDOW_BYTES)


def batches_together(settings: TrainingConfig, record_bytes: int, world: int) -> int:
    """Return how many batches are read together if they are not read in windows."""
    return max(1, PIECE_BYTES * world // (settings.batch_size * record_bytes))


def prefetch_depth(settings: TrainingConfig, records: int, record_bytes: int, world: int) -> int:
    """Return how many of batch_index_lists are read ahead: a window, or lists of 2 · workers batches, at least two."""
    if shuffle_of(settings, records, record_bytes).whole:
        return 1
    return max(2, -(-2 * settings.workers // batches_together(settings, record_bytes, world)))


def batch_index_lists(
    records: int, record_bytes: int, settings: TrainingConfig, rank: int, world: int, first_step: int, total: int
) -> Iterator[list[BatchIndices]]:
    """Yield this process's part of every global batch from first_step on; a list holds what is read in one piece.

    If windows are read whole, a list holds the batches that begin in one shuffle window; otherwise it holds one batch,
    or some small ones.
    """
    batch, per_epoch = settings.batch_size, steps_per_epoch(records, settings.batch_size)
    shuffle = shuffle_of(settings, records, record_bytes)
    together = batches_together(settings, record_bytes, world)

    def piece(step: int) -> tuple[int, int]:
        epoch, within = divmod(step, per_epoch)
        return epoch, within * batch // shuffle.window if shuffle.whole else within // together

    order: EpochOrder | None = None
    for (epoch, _), steps in itertools.groupby(range(first_step, total), piece):
        if order is None or order.epoch != epoch:
            order = EpochOrder(records, settings.seed, epoch, shuffle.block, shuffle.window)
        yield [replace(batch_indices(order, step % per_epoch, batch, rank, world), step=step) for step in steps]
