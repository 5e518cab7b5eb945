"""Split models by FSDP: if Accelerate's configuration asks for FSDP, every process keeps a part of a student.

This uses torch's fully_shard, which works on CPUs and GPUs; Accelerate has no FSDP on CPUs. Checkpoints and results
always hold whole tensors, so that a run can continue with or without FSDP and on any number of processes.
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
from singer.backbones import count_parameters, gives_tokens
from singer.errors import UserError

FSDP = "ACCELERATE_USE_FSDP"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Return whether FSDP is to split models."""
    return bool(parse_flag_from_env(FSDP)) and accelerator.num_processes > 1


def check_fsdp(precision: Precision) -> None:
    """Raise UserError if Accelerate's configuration asks for something unsupported, before Accelerate reads it."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("DeepSpeed is not supported; use DDP (multi-GPU in accelerate config) or FSDP")
    if parse_flag_from_env(FSDP) and precision == "fp16" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("FSDP with fp16 is not supported: each process has its own loss scale; use precision bf16")


def apply_fsdp(model: nn.Module, accelerator: Accelerator) -> tuple[int, int]:
    """Keep a part of every weight on each process.

    For computation, the blocks of a model of tokens are gathered one at a time, and all other weights at once. Parts of
    a block that a loss calls by themselves (model.called_apart) are gathered with the latter. Return the number of
    weights that this process keeps, and the number of all weights.
    """
    apart = {id(block) for block in getattr(model, "called_apart", ())}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for backbone in [module for module in model.modules() if gives_tokens(module)]:
        blocks: Any = getattr(backbone, "blocks", ())
        for block in blocks:
            if id(block) not in apart:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    return sum(kept), count_parameters(model)


class WholeModel:
    """The state of a model that FSDP split as whole tensors, on the CPU of the first process.

    All processes must call a method together.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Gather the state of the model."""
        return get_model_state_dict(self._model, options=_WHOLE)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Set the state of the model. Raises UserError if a tensor is missing, which torch would ignore."""
        for name in self._model.state_dict():
            if name not in state:
                raise UserError(f"it lacks {name}")
        set_model_state_dict(self._model, state, options=_WHOLE)


class WholeOptimiser:
    """The state of the optimiser of a model that FSDP split as whole tensors; see WholeModel."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self._model, self._optimiser = model, optimiser

    def state_dict(self) -> dict[str, Any]:
        """Gather the state of the optimiser."""
        return get_optimizer_state_dict(self._model, self._optimiser, options=_WHOLE)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Set the state of the optimiser.

        Raises UserError if the state has other groups of weights: torch would give them the decay of the new groups.
        """
        names = {id(p): name for name, p in self._model.named_parameters()}
        groups = [{names[id(p)] for p in group["params"]} for group in self._optimiser.param_groups]
        if [set(group["params"]) for group in state["param_groups"]] != groups:
            raise UserError("it was made by another version of singer; start the run anew (--overwrite)")
        set_optimizer_state_dict(self._model, self._optimiser, state, options=_WHOLE)
