"""Ctrl-C and a full disk: what a command says when one of them ends it, and how it goes on."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.runtime.error_kinds import one_line
from pipeline.runtime.logs import logger

# An interrupt or an error of the disk has this attribute if it ended a stage that had begun to write its output.
CLAIMED = "singer_claimed"
# Ctrl-C ends a command with this code, as a shell does.
INTERRUPTED = 130


def report_interrupt(error: KeyboardInterrupt, options: Sequence[str]) -> int:
    """Tell the user how to go on after Ctrl-C. Return the exit code.

    options: the options of the command that was interrupted, such as --resume if it has it.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.error("interrupted; go on with: %s", command_to_go_on(getattr(error, CLAIMED, False), options))
    return INTERRUPTED


def report_full_disk(error: OSError, options: Sequence[str]) -> int:
    """Tell the user how to go on after a disk was full. Return the exit code.

    options: the options of the command that it ended, such as --resume if it has it.
    """
    again = command_to_go_on(getattr(error, CLAIMED, False), options)
    logger.error("%s; make room there (df -h and df -i show what is left), then go on with: %s", one_line(error), again)
    return 2


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
