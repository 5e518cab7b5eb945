"""Tensors in files: safetensors, written durably, all or nothing."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
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


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError that names the file if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path, device=device)
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
