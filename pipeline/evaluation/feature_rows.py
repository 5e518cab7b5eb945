"""Where features are until a probe has read them: in memory, or in a file if they would fill it."""

import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from pipeline.runtime.machine import memory_bytes
from pipeline.storage import naming
from singer.errors import UserError

# The share of the machine's memory that one array of features may take, and of a GPU's free memory.
_MEMORY, _GPU = 1 / 16, 0.5


def fits(count: int, device: torch.device) -> bool:
    """Return whether so many float32 numbers may be on a device at once."""
    free = _GPU * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _MEMORY * memory_bytes()
    return 4 * count <= free


def empty_rows(shape: tuple[int, ...]) -> Tensor:
    """Return a float32 tensor on the CPU to be filled.

    One that does not fit memory is in a file without a name among the temporary files of the system (TMPDIR): its pages
    are written out and read again as there is need. Raises UserError if the disk is too small for it.
    """
    size = math.prod(shape)
    if fits(size, torch.device("cpu")):
        return torch.empty(shape)
    with tempfile.TemporaryFile() as file:
        reserve(file.fileno(), 4 * size, tempfile.gettempdir(), "set TMPDIR to a folder with more room")
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


def mapped_file(file: Path, shape: tuple[int, ...], remedy: str) -> np.memmap:
    """Return a new .npy file of float32, mapped, to be filled.

    Raises UserError, with the remedy, if the disk is too small.
    """
    with naming(file):
        made = open_memmap(file, "w+", np.float32, shape)
    with file.open("r+b") as opened:
        reserve(opened.fileno(), file.stat().st_size, file.parent, remedy)
    return made


def reserve(file: int, size: int, place: Path | str, remedy: str) -> None:
    """Give an open file its bytes on the disk: a mapped page that finds no place later kills the process.

    Raises UserError, with the remedy, if the disk is too small.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise UserError(
            f"the features take {size / 1e9:.3g} GB, which {place} does not have ({error.strerror}); {remedy}"
        ) from None


def moments(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the std (d,) float64 of the rows of all blocks (n, d), of which one at a time is read.

    The sums of two sets are joined as in Chan, Golub and LeVeque (1983), equation 2.1.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for block in blocks:
        var, center = torch.var_mean(block.double(), dim=0, correction=0)
        if not count:
            count, mean, squares = len(block), center, var * len(block)
            continue
        apart, total = center - mean, count + len(block)
        squares = squares + var * len(block) + apart.square() * (count * len(block) / total)
        mean, count = mean + apart * (len(block) / total), total
    return mean, (squares / count).sqrt()
