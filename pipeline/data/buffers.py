"""Host memory for batches, used again and again: fresh pages from the system cost as much as the copy into them."""

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_GRAIN = 1 << 16
_KEPT_BYTES = 1 << 30
# By size. Without a lock: buffers come back whenever the interpreter sees fit, even in the midst of these functions.
_free: dict[int, deque[np.ndarray]] = {}


def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A CPU tensor with undefined content. Its memory returns to the pool when the last view of it is gone."""
    if torch.cuda.is_available():
        # PyTorch's own pool of pinned memory knows which copies to the GPU are still under way.
        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _take(-(-size // _GRAIN) * _GRAIN)
    lent = memory[:size].view(dtype).reshape(shape)
    # All tensors that share its memory hold this very array, whatever is made of them.
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent)


def _take(size: int) -> np.ndarray:
    try:
        return _free[size].pop()
    except (KeyError, IndexError):
        return np.empty(size, dtype=np.uint8)


def _give_back(memory: np.ndarray) -> None:
    if memory.nbytes + sum(size * len(buffers) for size, buffers in list(_free.items())) > _KEPT_BYTES:
        _free.clear()
    if memory.nbytes <= _KEPT_BYTES:
        _free.setdefault(memory.nbytes, deque()).append(memory)
