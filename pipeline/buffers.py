"""Host memory for batches, used again and again: fresh pages from the system cost as much as the copy into them."""

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

_GRAIN = 1 << 16
_KEPT, _KEPT_BYTES = 64, 1 << 30
_lock = threading.Lock()
_buffers: list[np.ndarray] = []
# What sys.getrefcount counts of a buffer that nobody uses: the list, the loop's variable and its own argument.
_UNUSED = 3


def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    """A CPU tensor with undefined content. Its memory returns to the pool when the last view of it is gone."""
    if torch.cuda.is_available():
        # PyTorch's own pool of pinned memory knows which copies to the GPU are still under way.
        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _take(-(-size // _GRAIN) * _GRAIN)
    return torch.from_numpy(memory[:size].view(dtype).reshape(shape))


def _take(size: int) -> np.ndarray:
    with _lock:
        # In comprehensions, whose variables are gone behind them and count nowhere else.
        fitting = [n for n, b in enumerate(_buffers) if b.nbytes == size and sys.getrefcount(b) == _UNUSED]
        if fitting:
            return _buffers[fitting[0]]
        if len(_buffers) >= _KEPT or sum(b.nbytes for b in _buffers) + size > _KEPT_BYTES:
            _buffers[:] = [b for b in _buffers if sys.getrefcount(b) > _UNUSED]
        memory = np.empty(size, dtype=np.uint8)
        _buffers.append(memory)
        return memory
