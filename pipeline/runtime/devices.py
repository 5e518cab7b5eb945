"""Accelerate, set up the same way for every stage."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from pipeline.config import Precision
from pipeline.runtime.ranks import limit_seconds

_COLLECTIVE_SECONDS = 1800.0


def make_accelerator(precision: Precision) -> Accelerator:
    """An Accelerator of this precision, also where the process has used another before."""
    AcceleratorState._reset_state()
    # ranks.py finds ranks that are dead or hang; its barriers hold where one works alone for long. Between collective
    # operations a rank may compile, or wait for its first batch: longer than the ten minutes of the default.
    patient = InitProcessGroupKwargs(timeout=timedelta(seconds=max(_COLLECTIVE_SECONDS, 2 * limit_seconds())))
    # Students are put in shards by pipeline/training/fsdp.py, and nothing else is.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        return Accelerator(mixed_precision=precision, kwargs_handlers=[patient])
