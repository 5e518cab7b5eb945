"""The device and the processes of a stage, its autocast, and its set-up of Accelerate, the same for every stage."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env, patch_environment

from pipeline.config import Config, Precision
from pipeline.runtime.ranks import limit_seconds

_COLLECTIVE_SECONDS = 1800.0
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Buffers are not broadcast in every step: objectives and SyncBatchNorm make theirs from the records of all processes,
# and of those of other batch norms the first process's are stored. Gradients are views of what is sent, so that they
# are not held twice. Why other settings of DDP stay as they are: docs/log.md, "TF32, and the settings of DDP".
_DDP = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU: where a stage of one process works."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolved(precision: Precision) -> Precision:
    """Return what a precision of "auto" is on this machine: bf16 on a GPU that computes in it, else no.

    GPUs without bf16 have no TF32 either: both came with the same generation.
    """
    if precision != "auto":
        return precision
    gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def with_precision(config: Config) -> Config:
    """Return the configuration with the resolved precisions, so that an output says what it was made with."""
    sections = {name: getattr(config, name) for name in ("cache", "distill", "finetune")}
    return config.changed(**{name: {"precision": resolved(section.precision)} for name, section in sections.items()})


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast of a precision on a device; a CPU computes in float32 where the precision is fp16."""
    half = _HALF.get(resolved(precision))
    return torch.autocast(device.type, half, half is not None and (half, device.type) != (torch.float16, "cpu"))


def this_process() -> PartialState:
    """Return what Accelerate knows of this process: its device, its rank, and the number of processes.

    The first call in a process connects it with the others.
    """
    # watched_rank.py finds ranks that are dead or hang, and its barriers wait where one rank works alone for long.
    # Between collective operations a rank may compile, or wait for its first batch, for longer than the default's ten
    # minutes.
    patience = timedelta(seconds=max(_COLLECTIVE_SECONDS, 2 * limit_seconds()))
    with _own_environment():
        return PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=patience)


@contextmanager
def own_settings() -> Iterator[None]:
    """Keep apart what a caller has set in torch and Accelerate, until the block or function ends.

    Stages take gradients, and compute in float32 and on the devices that they name, also if the caller has other
    defaults, or is in inference mode or autocast. Accelerate keeps the precision and the accumulation of all
    Accelerators of a process in two classes. What it knows of the process itself, such as its device, is shared.
    """
    kept: list[tuple[Any, Any]] = [(kind, kind._shared_state) for kind in (AcceleratorState, GradientState)]
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    casting = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    caching = torch.is_autocast_cache_enabled()
    for state, _ in kept:
        state._shared_state = {}
    for kind in casting:
        torch.set_autocast_enabled(kind, False)
    # Weights that autocast has cast are kept until the outermost autocast ends, which is the caller's.
    torch.set_autocast_cache_enabled(caching and not casting)
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_autocast_cache_enabled(caching)
        for kind in casting:
            torch.set_autocast_enabled(kind, True)
        for state, shared in kept:
            state._shared_state = shared


def make_accelerator(precision: Precision) -> Accelerator:
    """Make an Accelerator that trains in this precision, also if the process has trained in another one before.

    Stages call it in `own_settings`, so that an Accelerator of the caller's stays as it is.
    """
    this_process()
    AcceleratorState._reset_state()
    with _own_environment():
        return Accelerator(mixed_precision=resolved(precision), kwargs_handlers=[_DDP])


def _own_environment() -> AbstractContextManager[None]:
    """Hide from Accelerate what its launcher may ask for and singer does itself, or not at all.

    training/fsdp.py splits students among processes, and nothing else. Accelerate would divide losses by the number of
    steps that it accumulates, which singer does not; the keys accumulate and compile are for that.
    """
    hidden: AbstractContextManager[None] = patch_environment(
        ACCELERATE_USE_FSDP="false", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1", ACCELERATE_DYNAMO_BACKEND="no"
    )
    return hidden
