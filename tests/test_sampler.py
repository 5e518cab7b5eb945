"""Read plans: every record once an epoch, in an order that depends on nothing but its arguments."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DistillConfig, FinetuneConfig
from pipeline.data.sampler import (
    PIECE_BYTES,
    WINDOW_BYTES,
    EpochOrder,
    batch_index_lists,
    batch_indices,
    prefetch_depth,
    shuffle_of,
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


@pytest.mark.parametrize(("block", "batch"), [(256, 256), (64, 1024), (2, 4)])
def test_a_block_that_is_given_is_mixed_with_others(block: int, batch: int) -> None:
    """However large the records are: those of a megabyte make windows that are read batch by batch."""
    shuffle = shuffle_of(DistillConfig(read_block=block, batch_size=batch), 10**6, 1 << 20)
    assert shuffle.block == block and shuffle.window % batch == 0
    assert shuffle.window >= max(4 * batch, 16 * block) and shuffle.whole == (shuffle.window <= 256)
    order = EpochOrder(10**6, 0, 0, *shuffle[:2])
    assert len(set((order.stretch(0, batch) // block).tolist())) > min(batch, 16) / 2


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
    shuffle = shuffle_of(config, records, size)
    in_windows = shuffle.whole
    assert shuffle[:2] == (block, min(window, records))
    assert in_windows == (block > 1 and min(window, records) * size <= WINDOW_BYTES)
    together = max(1, PIECE_BYTES // size * world // batch)
    first = min(first, 2 * per_epoch)
    ahead = prefetch_depth(config, records, size, world)
    assert ahead == 1 if in_windows else ahead >= 2 and ahead * together >= 2 * config.workers
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


@pytest.mark.parametrize(
    ("record_bytes", "batch", "block", "window"),
    [
        (20_000, 256, 26, 52 * 256),
        (106_000, 256, 4, 9 * 256),
        (106_000, 1024, 1, 2532),  # a window would be three batches
        (20_000, 4096, 1, 13_421),
        (400_000, 64, 1, 10 * 64),  # a block is one record
        (1 << 29, 1, 1, 1),
    ],
)
def test_the_default_depends_on_the_bytes_of_a_record(record_bytes: int, batch: int, block: int, window: int) -> None:
    shuffle = shuffle_of(DistillConfig(batch_size=batch), 1_281_167, record_bytes)
    assert shuffle == (block, window, block > 1)
    assert window * record_bytes <= max(WINDOW_BYTES, record_bytes)


def test_what_is_given_goes_before_the_default() -> None:
    """A block alone, whose window is larger if it would mix too little; a window alone, of blocks that are its part."""
    of = partial(shuffle_of, records=10**6, record_bytes=400_000)
    assert of(DistillConfig(read_block=64)) == (64, 1024, False)
    assert of(DistillConfig(read_block=16, batch_size=64)) == (16, 640, True)
    assert of(DistillConfig(read_block=1000)) == (1000, 62 * 256, False)
    assert of(DistillConfig(read_block=1))[0] == 1
    assert of(DistillConfig(shuffle_window=512)) == (1, 512, False)
    assert of(DistillConfig(shuffle_window=2048)) == (4, 2048, False)
    assert of(FinetuneConfig())[0] == 1


@given(st.integers(1, 6000), st.integers(40, 3000), st.sampled_from([1, 10**5, 10**6, 10**9]), st.integers(1, 4))
def test_the_default_order(records: int, batch: int, size: int, world: int) -> None:
    """Every record once an epoch, in batches that all processes of any number divide, whatever was read before."""
    config = DistillConfig(batch_size=batch, epochs=2)
    per_epoch = steps_per_epoch(records, batch)

    def batches(world: int, first: int) -> list[np.ndarray]:
        parts = [
            [p for found in batch_index_lists(records, size, config, rank, world, first, 2 * per_epoch) for p in found]
            for rank in range(world)
        ]
        return [np.concatenate([p.records[p.weights > 0] for p in step]) for step in zip(*parts, strict=True)]

    alone = batches(1, 0)
    for epoch in range(2):
        seen = np.concatenate(alone[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert (np.bincount(seen, minlength=records) == 1).all()
    first = per_epoch // 2
    for found, wanted in ((batches(world, 0), alone), (batches(world, first), alone[first:])):
        assert all((a == b).all() for a, b in zip(found, wanted, strict=True))


def test_a_cache_that_fits_in_a_window_is_shuffled_uniformly() -> None:
    """It is read in one piece, in the order of a plain shuffle."""
    size, config = WINDOW_BYTES // 5000, DistillConfig(epochs=1)
    (found,) = batch_index_lists(5000, size, config, 0, 1, 0, steps_per_epoch(5000, config.batch_size))
    assert shuffle_of(config, 5000, size).whole
    np.testing.assert_array_equal(np.concatenate([p.records for p in found]), EpochOrder(5000, 0, 0).stretch(0, 5000))
