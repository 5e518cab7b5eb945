"""Read plans: which records a process sees in which order. Pure functions of (seed, epoch, rank, world size, step)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """One process's part of a global batch.

    records: (n,) int64, the same n for all processes of a step; weights: (n,) float32, such that the mean over
    processes of sum(weight · loss) is the mean loss of the global batch. Records that only fill up weigh nothing.
    """

    records: np.ndarray
    weights: np.ndarray


def steps_per_epoch(records: int, batch: int) -> int:
    return -(-records // batch)


def epoch_order(records: int, seed: int, epoch: int) -> np.ndarray:
    """All records once, shuffled; the same on every process."""
    return np.random.default_rng([seed, epoch]).permutation(records)


def share(order: np.ndarray, step: int, batch: int, rank: int, world: int) -> Share:
    """The part of global batch `step` that process `rank` of `world` computes.

    The global batch does not depend on `world`. The last one of an epoch may be smaller; nothing is dropped or
    counted twice.
    """
    whole = order[step * batch : (step + 1) * batch]
    size = -(-len(whole) // world)
    mine = whole[rank * size : (rank + 1) * size]
    filling = np.repeat(whole[:1], size - len(mine))
    weights = np.concatenate([np.full(len(mine), world / len(whole)), np.zeros(len(filling))])
    return Share(np.concatenate([mine, filling]), weights.astype(np.float32))
