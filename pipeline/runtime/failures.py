"""Kinds of failures: what users can fix, the disk and the network, and defects of singer."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.runtime.logs import command_line, keep_traceback, logger, show_traceback
from pipeline.runtime.machine import machine, versions
from singer.errors import UserError

_MEMORY = (
    "lower the batch size (cache., refine., distill. or evaluate.batch_size; distill.accumulate splits it), or set "
    "the stage's precision to bf16, and start it again: with --resume, or with --overwrite if the setting cannot "
    "change any more"
)
# torch uses these words in a RuntimeError if the machine cannot run it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_GPU = ("driver", "busy or unavailable", "no kernel image is available", "uncorrectable ECC", "No CUDA GPUs")


# An interrupt has this attribute if it ended a stage that had begun to write its output.
CLAIMED = "singer_claimed"
# Ctrl-C ends a command with this code, as a shell does.
INTERRUPTED = 130


class DefectsFound(RuntimeError):
    """Parts of the work failed by defects. The message says so in one line, and the tracebacks are in logs."""


@dataclass(frozen=True)
class Failure:
    """A message of one line that says what went wrong. defect: whether it is singer's fault."""

    message: str
    defect: bool = False


def setting(config: str | None = None) -> str:
    """Return the first lines of a command's log. config: the resolved configuration as YAML."""
    lines = [
        f"command: {command_line()}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"machine: {machine()}",
        *([] if config is None else ["configuration:", config.rstrip()]),
    ]
    return "\n".join(lines)


def is_defect(error: Exception) -> bool:
    """Return whether an error is singer's fault: neither the user, nor the disk or the network can be its cause."""
    return not isinstance(explained(error), UserError | OSError | DefectsFound)


def explained(error: Exception) -> Exception:
    """Return the error, or a UserError with the remedy if the memory is too small or the GPU cannot be used."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    torch = sys.modules.get("torch")  # without it, no error is one of torch
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return UserError(f"the GPU has too little memory ({first}); {_MEMORY}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in text for s in _NO_MEMORY)):
        return UserError(f"out of memory ({first}); {_MEMORY}")
    if isinstance(error, RuntimeError) and "CUDA" in first and any(said in text for said in _NO_GPU):
        return UserError(f"the GPU cannot be used ({first}); see nvidia-smi, or hide it with CUDA_VISIBLE_DEVICES=''")
    return error


def failure(error: Exception) -> Failure:
    """Describe an error in one line. The whole traceback of a defect goes to a log, which the line names."""
    error = explained(error)
    if is_defect(error):
        log = keep_traceback(error)
        return Failure(f"defect: {type(error).__name__}: {one_line(error)}; see {log}", True)
    return Failure(one_line(error))


def report(error: Exception) -> int:
    """Tell the user what ended a command. Return its exit code: 1 for a defect, otherwise 2."""
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
    """Return an error's message on one line of at most `most` characters, or its class if it has no message."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(text.split())[:most] or type(error).__name__


def report_interrupt(error: KeyboardInterrupt, options: Sequence[str]) -> int:
    """Tell the user how to go on after Ctrl-C. Return the exit code.

    options: the options of the command that was interrupted, such as --resume if it has it.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.error("interrupted; go on with: %s", command_to_go_on(getattr(error, CLAIMED, False), options))
    return INTERRUPTED


def command_to_go_on(begun: bool, options: Sequence[str]) -> str:
    """Return the command that goes on where this process was interrupted, quoted for a shell.

    begun: whether it had begun to write its output; before that, the same command is right, also with --overwrite.
    """
    program, *words = sys.argv
    if begun and "--append" not in words:
        remedy = next((option for option in ("--resume", "--overwrite") if option in options), None)
        words = [word for word in words if word not in ("--resume", "--overwrite")] + ([remedy] if remedy else [])
    launched = "RANK" in os.environ and not any(word.startswith("--gpus") for word in words)
    return shlex.join([*_program(program, launched), *words])


def _program(file: str, launched: bool) -> list[str]:
    """Return the words that start singer as this process was started; launched: whether by a launcher."""
    name = Path(file).name
    if name.endswith(".py"):
        return ["accelerate", "launch", file] if launched else ["python", file]
    found = Path(shutil.which(name) or "")
    return [file if Path(file).is_file() and found.resolve() != Path(file).resolve() else name]
