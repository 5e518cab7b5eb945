"""Host memory for batches, which is reused: fresh pages from the system cost as much as the copy into them."""

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_GRAIN = 1 << 16
_KEPT_BYTES = 1 << 30
# Free buffers by size. There is no lock: the interpreter may return buffers at any time, even within these functions.
_free: dict[int, deque[np.ndarray]] = {}


def empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return a CPU tensor with undefined content. Its memory returns to the pool when its last view is gone."""
    # A process that does not use a GPU, such as a worker of a DataLoader, must not begin to by this.
    if torch.cuda.is_initialized():
        # PyTorch's own pool of pinned memory knows which copies to the GPU are still under way.
        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = _take(-(-size // _GRAIN) * _GRAIN)
    lent = memory[:size].view(dtype).reshape(shape)
    # All tensors that share its memory, also views, hold a reference to this array.
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent)


def kept_bytes() -> int:
    """Return how many bytes of memory are in the pool, free to be lent again."""
    return sum(size * len(buffers) for size, buffers in list(_free.items()))


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; a copy from the CPU to a GPU is started, and not waited for.

    This needs pinned memory: what is not in it goes there first. The CPU must not change the tensor afterwards.
    """
    from_cpu, target = tensor.device.type == "cpu", torch.device(device)
    if from_cpu and target.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # The CPU reads a copy from a GPU at once, so that copy must be complete on return.
    return tensor.to(target, non_blocking=from_cpu)


def _take(size: int) -> np.ndarray:
    try:
        return _free[size].pop()
    except (KeyError, IndexError):
        return np.empty(size, dtype=np.uint8)


def _give_back(memory: np.ndarray) -> None:
    room = _KEPT_BYTES - memory.nbytes
    # Sizes that were not used for longest go first: perhaps they do not come again.
    for size in list(_free):
        if kept_bytes() > room and size != memory.nbytes:
            _free.pop(size, None)
    if kept_bytes() <= room:
        _free[memory.nbytes] = deque([*_free.pop(memory.nbytes, ()), memory])
