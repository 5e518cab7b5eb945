"""Put a teacher that is too large for its device where its weights fit: in fewer bits, on several GPUs, or outside.

Only the blocks are placed elsewhere, which are nearly all of a large model; the rest is on the process's device.
Wherever the weights are, the features are the same.
"""

import copy
import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn

from pipeline.config import Dtype, Offload
from singer.errors import UserError


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, wherever they are."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def narrow(model: nn.Module, dtype: Dtype) -> None:
    """Convert a model to a dtype, but for its rotary embedding: angles need more digits than bfloat16 has."""
    if dtype == "float32":
        return
    rope = copy.deepcopy(getattr(model, "rope", None))
    model.to(getattr(torch, dtype))
    if rope is not None:
        model.rope = rope


def place_model(model: nn.Module, device: torch.device, offload: Offload) -> None:
    """Move a model to its device, and its blocks to where `offload` says (see teacher.offload in the configuration).

    Raises UserError if they do not fit there, or the model has no list of blocks.
    """
    if offload == "none" or (offload == "auto" and device.type == "cpu"):
        _check_room(model, device)
        model.to(device)
        return
    blocks: Any = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise UserError(
            f"teacher.offload {offload} needs a model with a list of blocks, and a {type(model).__name__} has none; "
            "leave teacher.offload at none"
        )
    model.blocks = nn.Identity()
    model.to(device)
    model.blocks = blocks
    kind = type(blocks[0]).__name__
    places: dict[str, Any] = {str(number): offload for number in range(len(blocks))}
    if offload == "auto":
        places = infer_auto_device_map(blocks, no_split_module_classes=[kind])
    _dispatch(blocks, places, device, kind)


def _dispatch(blocks: nn.Module, places: Mapping[str, Any], device: torch.device, kind: str) -> None:
    """Let Accelerate place blocks, and bring them to their device one at a time, when they are needed.

    places: {number of a block: a GPU, "cpu" or "disk"}; kind: the name of the blocks' class.
    """
    where = set(places.values())
    in_memory = {name for name, kept in places.items() if kept == "cpu"}
    outside = {name: tensor for name, tensor in blocks.state_dict().items() if {"", name.split(".")[0]} & in_memory}
    folder = tempfile.mkdtemp(prefix="singer-teacher-") if "disk" in where else None
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what was asked for
    dispatch_model(
        blocks,
        dict(places),
        main_device=device,
        state_dict=outside or None,
        offload_dir=folder,
        preload_module_classes=[kind],
        force_hooks=True,
    )
    if folder is not None:
        weakref.finalize(blocks, shutil.rmtree, folder, ignore_errors=True)
    if not outside and folder is None:
        return
    weights = OffloadedWeightsLoader(state_dict=outside, save_folder=folder)

    def fill(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
        """Put the weights that are elsewhere into a state dict."""
        for name, value in state.items():
            if isinstance(value, Tensor) and value.is_meta:
                state[name] = weights[name.removeprefix(prefix)]

    blocks.register_state_dict_post_hook(fill)


def _check_room(model: nn.Module, device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed, (free, _) = weight_bytes(model), torch.cuda.mem_get_info(device)
    if needed > free:
        raise UserError(
            f"the teacher's weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU are free; take "
            "--set teacher.dtype=bfloat16, --set teacher.offload=auto (all GPUs at hand) or --set teacher.offload=cpu"
        )
