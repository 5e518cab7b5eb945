"""What went wrong, told apart: what users can fix, the disk and the network, and defects of singer."""

from dataclasses import dataclass

import torch

from pipeline.runtime.logs import command_line, keep_traceback, logger, show_traceback
from pipeline.runtime.machine import machine, versions
from singer.errors import UserError

_MEMORY = (
    "lower the batch size (cache., refine., distill. or evaluate.batch_size; distill.accumulate splits it), or set "
    "the stage's precision to bf16, and go on with --resume"
)
# What torch says, in a RuntimeError, of a machine that cannot run it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_GPU = ("driver", "busy or unavailable", "no kernel image is available", "uncorrectable ECC", "No CUDA GPUs")


class DefectsFound(RuntimeError):
    """Say in one line that parts of the work failed by defects, whose tracebacks are in logs."""


@dataclass(frozen=True)
class Failure:
    """What went wrong, in one line. defect: whether it is singer's fault."""

    message: str
    defect: bool = False


def setting(config: str | None = None) -> str:
    """What the log of a command begins with. config: resolved, as YAML."""
    lines = [
        f"command: {command_line()}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"machine: {machine()}",
        *([] if config is None else ["configuration:", config.rstrip()]),
    ]
    return "\n".join(lines)


def is_defect(error: Exception) -> bool:
    return not isinstance(explained(error), UserError | OSError | DefectsFound)


def explained(error: Exception) -> Exception:
    """The error, or a UserError that says what users can do where a library cannot know it: too little memory."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(f"the GPU has too little memory ({first}); {_MEMORY}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in text for s in _NO_MEMORY)):
        return UserError(f"out of memory ({first}); {_MEMORY}")
    if isinstance(error, RuntimeError) and "CUDA" in first and any(said in text for said in _NO_GPU):
        return UserError(f"the GPU cannot be used ({first}); see nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES=''")
    return error


def failure(error: Exception) -> Failure:
    """An error in one line; of a defect, the whole traceback goes to a log, which the line names."""
    error = explained(error)
    if is_defect(error):
        log = keep_traceback(error)
        return Failure(f"defect: {type(error).__name__}: {one_line(error)}; see {log}", True)
    return Failure(one_line(error))


def report(error: Exception) -> int:
    """Tell the user what ended a command; its exit code: 1 of a defect, otherwise 2."""
    error = explained(error)
    if is_defect(error):
        log = keep_traceback(error)
        show_traceback(error)
        logger.error(
            "this is a defect of singer, not of what it was given; please report it with its log, %s, which has the "
            "whole traceback",
            log,
        )
        return 1
    logger.error(one_line(error, None))
    return 1 if isinstance(error, DefectsFound) else 2


def one_line(error: Exception, most: int | None = 500) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(text.split())[:most] or type(error).__name__
