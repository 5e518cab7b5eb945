"""Collective operations for objectives that compare the records of a whole batch, of which each process has a part.

All processes call these functions at the same place, with tensors of one shape. With one process they return what they
are given. No gradients pass.
"""

import torch
from torch import Tensor, distributed


def _count() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@torch.no_grad()
def rows_of_all(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all processes, (processes x n, ...), in the order of their ranks."""
    if _count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_count())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def sum_of_all(x: Tensor) -> Tensor:
    """Return the sum over processes."""
    return x if _count() == 1 else _reduced(x, distributed.ReduceOp.SUM)


@torch.no_grad()
def mean_of_all(x: Tensor) -> Tensor:
    """Return the mean over processes."""
    return sum_of_all(x) / _count()


@torch.no_grad()
def largest_of_all(x: Tensor) -> Tensor:
    """Return the largest over processes."""
    return x if _count() == 1 else _reduced(x, distributed.ReduceOp.MAX)


@torch.no_grad()
def of_first(x: Tensor) -> Tensor:
    """Return what the first process has."""
    if _count() > 1:
        x = x.clone()
        distributed.broadcast(x, 0)
    return x


def _reduced(x: Tensor, by: distributed.ReduceOp.RedOpType) -> Tensor:
    x = x.clone()
    distributed.all_reduce(x, by)
    return x
