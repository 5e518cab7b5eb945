"""The difference between the sampler's order and a uniform shuffle, for several read_block and shuffle_window.

    python benchmarks/shuffle_quality.py [--records 100000] [--batch 256] [--epochs 5] [--record-kb 20 50 106 400]

It prints a Markdown table of means over epochs. With --record-kb, it has the defaults for records of these sizes.
Distance is the distance in the epoch of records that are neighbours in storage, as a share of the epoch; it is 1/3 in a
uniform shuffle. Pairs is how often two records of one block of storage (read_block, at least 16) are in the same batch,
over the value by chance. Beside is the share of records whose next one in storage, such as the other view of an image,
is in the same batch. Class spread is the standard deviation of the number of records of a class in a batch, over that
of a uniform shuffle, if storage is sorted by class (100 classes).
"""

import argparse
from collections.abc import Iterator

import numpy as np

from pipeline.config import DistillConfig
from pipeline.data.sampler import EpochOrder, shuffle_of

BLOCKS = (1, 16, 64, 256)
WINDOWS = (4096, 16384, 65536)
CLASSES = 100


def epoch(records: int, seed: int, block: int, window: int) -> np.ndarray:
    """Return all records in the order of an epoch."""
    order = EpochOrder(records, 0, seed, block, window)
    return np.concatenate([order.stretch(start, start + window) for start in range(0, records, window)])


def neighbour_distance(order: np.ndarray) -> float:
    """Return the mean distance in the epoch of neighbours in storage, as a share of the epoch."""
    place = np.argsort(order)
    return float(np.abs(np.diff(place)).mean() / len(order))


def pairs(order: np.ndarray, batch: int, block: int) -> float:
    """Return the pairs of one block's records in a batch, over the number expected in a uniform shuffle."""
    blocks = order[: len(order) // batch * batch].reshape(-1, batch) // block
    met = sum(float((n * (n - 1)).sum()) for n in (np.unique(row, return_counts=True)[1] for row in blocks))
    sizes = np.bincount(np.arange(len(order)) // block).astype(float)
    chance = (sizes * (sizes - 1)).sum() / (len(order) * (len(order) - 1)) * blocks.size * (batch - 1)
    return met / float(chance)


def beside(order: np.ndarray, batch: int) -> float:
    """Return the share of records whose next one in storage is in the same batch."""
    batches = np.argsort(order) // batch
    return float((np.diff(batches) == 0).mean())


def class_spread(order: np.ndarray, batch: int) -> float:
    """Return the standard deviation of the number of a class's records in a batch, for storage sorted by class."""
    classes = (order[: len(order) // batch * batch] * CLASSES // len(order)).reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=CLASSES) for row in classes])
    return float(counts.std())


def settings(records: int, batch: int, record_kb: list[int]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, read_block, shuffle_window) of each row; a window that holds all records is a plain shuffle."""
    for kb in record_kb:
        shuffle = shuffle_of(DistillConfig(batch_size=batch), records, 1000 * kb)
        yield f"{kb} kB: {shuffle.block}", shuffle.block, shuffle.window if shuffle.block > 1 else records
    for block in BLOCKS if not record_kb else ():
        for window in WINDOWS if block > 1 else [records]:
            yield f"{block}", block, window


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--record-kb", type=int, nargs="+", default=[], help="defaults for records of these sizes")
    options = parser.parse_args()
    n, batch, epochs = options.records, options.batch, range(options.epochs)
    uniform = np.mean([class_spread(np.random.default_rng(e).permutation(n), batch) for e in epochs])
    print(f"{n} records, batches of {batch}, {options.epochs} epochs\n")
    print("| read_block | shuffle_window | distance | pairs, by chance 1 | beside, % | class spread |")
    print("|---|---|---|---|---|---|")
    for name, block, window in settings(n, batch, options.record_kb):
        orders = [epoch(n, e, block, window) for e in epochs]
        assert all((np.bincount(order, minlength=n) == 1).all() for order in orders)
        distance = np.mean([neighbour_distance(order) for order in orders])
        met = np.mean([pairs(order, batch, max(block, BLOCKS[1])) for order in orders])
        near = 100 * np.mean([beside(order, batch) for order in orders])
        spread = np.mean([class_spread(order, batch) for order in orders]) / uniform
        shown = "all" if window == n else window
        print(f"| {name} | {shown} | {distance:.3f} | {met:.2f} | {near:.2f} | {spread:.2f} |", flush=True)


if __name__ == "__main__":
    main()
