"""Accelerate, set up the same way for every stage."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from pipeline.config import Precision


def make_accelerator(precision: Precision) -> Accelerator:
    """An Accelerator of this precision, also where the process has used another before."""
    AcceleratorState._reset_state()
    # While the main process indexes and calibrates, the others wait: longer than the ten minutes of the default.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    return Accelerator(mixed_precision=precision, kwargs_handlers=[patient])


def require_whole_models() -> None:
    """Raise ValueError if Accelerate's configuration asks for models in shards, which nothing here can store.

    Accelerate itself has no FSDP on CPUs, so that it could not be tried.
    """
    flags = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    for name, flag in flags.items():
        if parse_flag_from_env(flag):
            raise ValueError(f"{name} is not supported; students are small: use DDP (multi-GPU in accelerate config)")
