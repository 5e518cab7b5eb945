"""Read plans: every record once an epoch, in an order that depends on nothing but its arguments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DistillConfig
from pipeline.data.sampler import (
    PIECE_BYTES,
    WINDOW_BYTES,
    EpochOrder,
    batch_index_lists,
    batch_indices,
    prefetch_depth,
    reads_windows,
    steps_per_epoch,
)

blocks, windows = st.integers(1, 40), st.integers(1, 90)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 5), st.integers(0, 9), blocks, windows)
def test_every_record_once_an_epoch(records: int, batch: int, world: int, epoch: int, block: int, window: int) -> None:
    order = EpochOrder(records, 3, epoch, block, window)
    counted = np.zeros(records)
    for step in range(steps_per_epoch(records, batch)):
        parts = [batch_indices(order, step, batch, rank, world) for rank in range(world)]
        assert len({len(p.records) for p in parts}) == 1
        whole = order.stretch(step * batch, (step + 1) * batch)
        for part in parts:
            np.testing.assert_allclose(part.weights[part.weights > 0], world / len(whole), rtol=1e-6)
            counted[part.records[part.weights > 0]] += 1
        # The mean over processes of their weighted sums is the mean of the batch.
        values = np.sin(np.arange(records))
        mean = sum((values[p.records] * p.weights).sum() for p in parts) / world
        assert mean == pytest.approx(values[whole].mean(), abs=1e-5)
    assert (counted == 1).all()


@given(st.integers(1, 300), blocks, windows, st.integers(0, 299), st.integers(0, 80))
def test_any_stretch_can_be_read_alone(records: int, block: int, window: int, start: int, length: int) -> None:
    """A run that resumes in mid-epoch goes on in the same order."""
    whole = EpochOrder(records, 0, 1, block, window).stretch(0, records)
    alone = EpochOrder(records, 0, 1, block, window).stretch(start, start + length)
    np.testing.assert_array_equal(alone, whole[start : start + length])


@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 3),
    blocks,
    windows,
    st.integers(0, 30),
    st.sampled_from([1, PIECE_BYTES // 90, WINDOW_BYTES // 3]),
)
def test_lists_hold_every_step_once(
    records: int, batch: int, world: int, block: int, window: int, first: int, size: int
) -> None:
    """The shares are those of single steps; a list is what begins in one window, if that is small enough, or else a
    step or a few small ones.
    """
    window = max(window, block)
    config = DistillConfig(batch_size=batch, read_block=block, shuffle_window=window, epochs=2, seed=3)
    per_epoch = steps_per_epoch(records, batch)
    in_windows = reads_windows(config, size)
    assert in_windows == (block > 1 and window * size <= WINDOW_BYTES)
    together = max(1, PIECE_BYTES // size * world // batch)
    first = min(first, 2 * per_epoch)
    ahead = prefetch_depth(config, size, world)
    assert ahead == 2 if in_windows else ahead >= 2 and ahead * together >= 2 * config.workers
    lists = list(batch_index_lists(records, size, config, world - 1, world, first, 2 * per_epoch))
    step = first
    for found in lists:
        within = [(step + n) % per_epoch for n in range(len(found))]
        places = {(step + n) // per_epoch for n in range(len(found))}
        assert len(places) == 1
        assert len({w * batch // window if in_windows else w // together for w in within}) == 1
        for part in found:
            epoch, place = divmod(step, per_epoch)
            alone = batch_indices(EpochOrder(records, 3, epoch, block, window), place, batch, world - 1, world)
            np.testing.assert_array_equal(part.records, alone.records)
            np.testing.assert_array_equal(part.weights, alone.weights)
            step += 1
    assert step == 2 * per_epoch
    if not first:
        windows_begun = len({s * batch // window for s in range(per_epoch)})
        assert len(lists) == 2 * (windows_begun if in_windows else -(-per_epoch // together))


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, block: int) -> list[int]:
        return EpochOrder(50, seed, epoch, block, 20).stretch(0, 50).tolist()

    for block in (1, 4):
        assert order(0, 1, block) == order(0, 1, block)
        assert order(0, 1, block) != order(0, 2, block)
        assert order(0, 1, block) != order(1, 1, block)


def test_blocks_stay_near_each_other() -> None:
    """Within a window, only as many places of the disk are visited as it holds blocks."""
    order = EpochOrder(10_000, 0, 0, 50, 1000)
    for start in range(0, 10_000, 1000):
        assert len(set((order.stretch(start, start + 1000) // 50).tolist())) == 20
