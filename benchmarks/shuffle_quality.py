"""The difference between the sampler's order and a uniform shuffle, for several read_block and shuffle_window.

    python benchmarks/shuffle_quality.py [--records 100000] [--batch 256] [--epochs 5]

It prints a Markdown table of means over epochs. Distance is the distance in the epoch of records that are neighbours in
storage, as a share of the epoch; it is 1/3 in a uniform shuffle. Pairs is how often two records of one block of storage
(read_block, at least 16) are in the same batch, over the value by chance. Class spread is the standard deviation of the
number of records of a class in a batch, over that of a uniform shuffle, if storage is sorted by class (100 classes).
"""

import argparse

import numpy as np

from pipeline.data.sampler import EpochOrder

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


def class_spread(order: np.ndarray, batch: int) -> float:
    """Return the standard deviation of the number of a class's records in a batch, for storage sorted by class."""
    classes = (order[: len(order) // batch * batch] * CLASSES // len(order)).reshape(-1, batch)
    counts = np.stack([np.bincount(row, minlength=CLASSES) for row in classes])
    return float(counts.std())


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    n, batch, epochs = options.records, options.batch, range(options.epochs)
    uniform = np.mean([class_spread(np.random.default_rng(e).permutation(n), batch) for e in epochs])
    print(f"{n} records, batches of {batch}, {options.epochs} epochs\n")
    print("| read_block | shuffle_window | distance | pairs, by chance 1 | class spread |\n|---|---|---|---|---|")
    for block in BLOCKS:
        # A plain shuffle has no windows.
        for window in WINDOWS if block > 1 else WINDOWS[:1]:
            orders = [epoch(n, e, block, window) for e in epochs]
            assert all((np.bincount(order, minlength=n) == 1).all() for order in orders)
            distance = np.mean([neighbour_distance(order) for order in orders])
            met = np.mean([pairs(order, batch, max(block, BLOCKS[1])) for order in orders])
            spread = np.mean([class_spread(order, batch) for order in orders]) / uniform
            print(f"| {block} | {window if block > 1 else 'none'} | {distance:.3f} | {met:.2f} | {spread:.2f} |")


if __name__ == "__main__":
    main()
