"""Models in shards: where Accelerate's configuration says FSDP, every process keeps its part of a student.

torch's fully_shard does it by itself, on CPUs as on GPUs; Accelerate has no FSDP on CPUs. What is kept of a run is
whole in any case, so that it goes on with or without shards, on any number of processes.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pipeline.config import Precision
from singer.backbones import is_vit
from singer.errors import UserError

FSDP = "ACCELERATE_USE_FSDP"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def wants_shards(accelerator: Accelerator) -> bool:
    return bool(parse_flag_from_env(FSDP)) and accelerator.num_processes > 1


def check_sharding(precision: Precision) -> None:
    """Raise UserError if Accelerate's configuration asks for what is not possible, before Accelerate sees it."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("DeepSpeed is not supported; use DDP (multi-GPU in accelerate config) or FSDP")
    if parse_flag_from_env(FSDP) and precision == "fp16" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("FSDP with fp16 is not supported: its loss scale is of one process; use precision bf16")


def shard(model: nn.Module, accelerator: Accelerator) -> tuple[int, int]:
    """Keep a part of every weight on each process; blocks of a ViT are put together one at a time, all else at once.

    Returns how many weights this process keeps, of how many.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for vit in [module for module in model.modules() if is_vit(module)]:
        blocks: Any = vit.blocks
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    return sum(kept), sum(p.numel() for p in model.parameters())


class WholeModel:
    """The state of a model, whole on the CPU of the first process. All processes must ask for it together."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self._model, options=_WHOLE)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises UserError if a part is missing, which torch would leave as it is."""
        for name in self._model.state_dict():
            if name not in state:
                raise UserError(f"it lacks {name}")
        set_model_state_dict(self._model, state, options=_WHOLE)


class WholeOptimiser:
    """The state of a model's optimiser, as WholeModel gives it."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self._model, self._optimiser = model, optimiser

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._optimiser, options=_WHOLE)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Raises UserError for a state with other groups: torch would give weights the decay of the new ones."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        groups = [{names[id(p)] for p in group["params"]} for group in self._optimiser.param_groups]
        if [set(group["params"]) for group in state["param_groups"]] != groups:
            raise UserError("it was made by another version of singer; start the run anew (--overwrite)")
        set_optimizer_state_dict(self._model, self._optimiser, state, options=_WHOLE)
