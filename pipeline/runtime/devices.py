"""Set-up of Accelerate, the same for every stage."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment

from pipeline.config import Precision
from pipeline.runtime.ranks import limit_seconds

_COLLECTIVE_SECONDS = 1800.0


def make_accelerator(precision: Precision) -> Accelerator:
    """Make an Accelerator of this precision, also if the process has used another one before."""
    AcceleratorState._reset_state()
    # watched_rank.py finds ranks that are dead or hang, and its barriers wait where one rank works alone for long.
    # Between collective operations a rank may compile, or wait for its first batch, for longer than the default's ten
    # minutes.
    patient = InitProcessGroupKwargs(timeout=timedelta(seconds=max(_COLLECTIVE_SECONDS, 2 * limit_seconds())))
    # pipeline/training/fsdp.py shards students; nothing else is sharded.
    with patch_environment(ACCELERATE_USE_FSDP="false"):
        return Accelerator(mixed_precision=precision, kwargs_handlers=[patient])
