"""Ctrl-C, other signals that end a process, and a full disk: what a command says then, and how it goes on."""

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.runtime.error_kinds import one_line
from pipeline.runtime.logs import logger

# {signal: what handles it where nothing else was set}: the end of a terminal or an ssh session, the end of a job's time
# or its preemption, and Ctrl-C.
_ENDING = {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
# Whether the command that runs has begun to write its output.
_begun = False


class Ended(KeyboardInterrupt):
    """A signal ends this process. number: the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def output_begun() -> None:
    """Note that the command has begun to write its output: only --resume, or --overwrite, goes on from here."""
    global _begun
    _begun = True


@contextmanager
def ending_signals(options: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Let a signal that ends a process raise Ended in a command, as Ctrl-C does; a second Ctrl-C ends it at once.

    What is ignored stays so (nohup), and so do all signals under a launcher, whose ranks have their own way
    (watched_rank.py). options: returns those of the command, see report_interrupt.
    """
    global _begun
    _begun = False
    ours: dict[signal.Signals, object] = {}
    if threading.current_thread() is threading.main_thread() and "RANK" not in os.environ:
        ours = {number: usual for number, usual in _ENDING.items() if signal.getsignal(number) == usual}
    ended = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal ended
        ended = True
        for each in ours:
            signal.signal(each, at_once if each == signal.SIGINT else signal.SIG_IGN)
        raise Ended(number)

    def at_once(number: int, _: FrameType | None) -> None:
        with suppress(OSError):  # the console's lock may be held by the code that was interrupted
            os.write(2, f"error: {_told(number, options())}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if ended:
            # While the process exits, Ctrl-C is not to interrupt the interpreter's own work with a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        else:
            for number, usual in ours.items():
                signal.signal(number, usual)  # type: ignore[arg-type]


def report_interrupt(error: KeyboardInterrupt, options: Sequence[str]) -> int:
    """Tell the user how to go on after Ctrl-C, or another signal. Return the exit code, which is a shell's.

    options: the options of the command that was interrupted, such as --resume if it has it.
    """
    number = error.number if isinstance(error, Ended) else signal.SIGINT
    if os.environ.get("RANK", "0") == "0":
        logger.error("%s", _told(number, options))
    return 128 + number


def _told(number: int, options: Sequence[str]) -> str:
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"{what}; go on with: {command_to_go_on(_begun, options)}"


def report_full_disk(error: OSError, options: Sequence[str]) -> int:
    """Tell the user how to go on after a disk was full. Return the exit code.

    options: the options of the command that it ended, such as --resume if it has it.
    """
    again = command_to_go_on(_begun, options)
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
