"""Kinds of errors: what users can fix, the disk and the network, and defects of singer."""

import errno
import os
import sys

from singer.errors import UserError

_MEMORY = (
    "lower the batch size (cache., refine., distill. or evaluate.batch_size; distill.accumulate splits it), or set "
    "the stage's precision to bf16, and start it again: with --resume, or with --overwrite if the setting cannot "
    "change any more"
)
# torch uses these words in a RuntimeError if the machine cannot run it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_GPU = ("driver", "busy or unavailable", "no kernel image is available", "uncorrectable ECC", "No CUDA GPUs")


# What the system says of a full disk.
FULL = (errno.ENOSPC, errno.EDQUOT)


class DefectsFound(RuntimeError):
    """Parts of the work failed by defects. The message says so in one line, and the tracebacks are in logs."""


def is_defect(error: Exception) -> bool:
    """Return whether an error is singer's fault: neither the user, nor the disk or the network can be its cause."""
    return not isinstance(explained(error), UserError | OSError | DefectsFound)


def explained(error: Exception) -> Exception:
    """Return the error, or a UserError with the remedy if memory, GPU or a path of the user's is its cause."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    torch = sys.modules.get("torch")  # without it, no error is one of torch
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return UserError(f"the GPU has too little memory ({first}); {_MEMORY}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in text for s in _NO_MEMORY)):
        return UserError(f"out of memory ({first}); {_MEMORY}")
    if isinstance(error, RuntimeError) and "CUDA" in first and any(said in text for said in _NO_GPU):
        return UserError(f"the GPU cannot be used ({first}); see nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES=''")
    if isinstance(error, RuntimeError) and first.startswith("Symlink loop"):  # so pathlib says it
        return UserError(f"a link leads to itself ({first}); give another path")
    return error


def one_line(error: Exception, most: int | None = 500) -> str:
    """Return an error's message on one line of at most `most` characters, or its class if it has no message."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        text = error.strerror + (f" ({os.fsdecode(name) if isinstance(name, bytes) else name})" if name else "")
    return " ".join(text.split())[:most] or type(error).__name__
