"""Tensors in files: safetensors, written durably, all or nothing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.storage.atomic import write_atomic
from singer.errors import UserError


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, each with memory of its own: safetensors refuses tied weights."""
    found: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return found


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    data: bytes = safetensors.torch.save(separate(tensors))
    return data


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, durably, all or nothing."""
    write_atomic(path, tensor_bytes(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, to the CPU. Raises UserError that names the file if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def parse_tensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Parse the bytes of a safetensors file. Raises UserError that names the file if it is damaged."""
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"{name} is damaged: {str(error).splitlines()[0]}") from None


def read_matrix(path: Path) -> Tensor:
    """Read a .npy of numbers, (rows, columns), as float32. Raises UserError that names the file if it holds no such."""
    try:
        values = np.load(path, allow_pickle=False)
        if values.ndim != 2 or values.dtype.kind not in "fiu" or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"it holds {values.dtype} of shape {values.shape}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a .npy of finite numbers, (rows, columns): {reason}") from None
    return torch.from_numpy(values.astype(np.float32))
