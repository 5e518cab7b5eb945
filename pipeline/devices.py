"""Accelerate, set up the same way for every stage."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from pipeline.config import Precision


def make_accelerator(precision: Precision) -> Accelerator:
    """An Accelerator of this precision, also where the process has used another before."""
    AcceleratorState._reset_state()
    # While the main process indexes and calibrates, the others wait: longer than the ten minutes of the default.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    # Students are put in shards by pipeline/fsdp.py, and nothing else is.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        return Accelerator(mixed_precision=precision, kwargs_handlers=[patient])
