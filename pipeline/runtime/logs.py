"""Messages: the logger `singer`, what the console shows of it, and log files.

Importing singer installs no handler. A command shows messages on stderr, see on_console(); every stage adds them to the
log file of its output, see log_file().
"""

import errno
import logging
import os
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from pipeline.runtime.error_kinds import is_defect
from pipeline.runtime.machine import machine, versions

LOG = "singer.log"
logger = logging.getLogger("singer")
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)


class _Stderr:
    """Writes to stderr, while it is there: its reader or terminal may go. The work goes on, and its log has all."""

    def write(self, text: str) -> None:
        """Write text, or nothing."""
        with self._lost():
            self._stream.write(text)

    def flush(self) -> None:
        """Show what was written."""
        with self._lost():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def _stream(self) -> Any:
        # While a bar is shown, rich takes the place of stderr.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                # What is buffered goes nowhere when the process ends, and fails no more.
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, self._stream.fileno())
                os.close(silent)


# With COLUMNS=0 nothing would be shown.
_WIDTH = None if os.environ.get("COLUMNS", "80").strip("0") else 80
console = Console(file=cast(Any, _Stderr()), highlight=False, soft_wrap=True, emoji=False, width=_WIDTH)
_WARNINGS = "py.warnings"
# So many innermost frames of a traceback are shown.
_FRAMES = 4
# This attribute of an error names the file with its whole traceback.
_KEPT = "singer_log"


def is_log(name: str) -> bool:
    """Return whether a file of this name, in any folder, is a log: logs are not part of an output."""
    base = name.rpartition("/")[2]
    return base == LOG or (base.startswith("singer-rank") and base.endswith(".log"))


def rank() -> int:
    """Return the number of this process among those of a command; only number 0 shows messages."""
    return int(os.environ.get("RANK", "0"))


def rank_log() -> str:
    """Return the name of this process's log file."""
    return f"singer-rank{rank()}.log" if rank() else LOG


class _Screen(logging.Handler):
    """Shows records on the console: one line each, each warning once. Later processes show only errors."""

    def __init__(self) -> None:
        super().__init__(logging.INFO if rank() == 0 else logging.ERROR)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "on_bar", False):
            return
        text = _text(record)
        if not (_is_ours(record) or record.name == _WARNINGS):
            text = f"{record.name}: {text}"
        if record.levelno >= logging.WARNING:
            # The key has no place: one message from two lines of a library is the same to the user.
            key = text.partition(": ")[2] if record.name == _WARNINGS else text
            if record.levelno == logging.WARNING and key in self._shown:
                return
            self._shown.add(key)
            text = f"{record.levelname.lower()}: {' '.join(text.split())}"
        console.print(text, markup=False)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == logger.name


def _text(record: logging.LogRecord) -> str:
    """Return the message; for a Python warning, without the line of source that Python adds."""
    text = record.getMessage().rstrip()
    lines = text.splitlines()
    return "\n".join(lines[:-1]) if record.name == _WARNINGS and len(lines) > 1 and lines[-1][:2] == "  " else text


_screen: _Screen | None = None
_once: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    """Log a warning, unless the command or the stage that is running has logged one of its kind."""
    if kind not in _once:
        _once.add(kind)
        logger.warning("%s", text)


@contextmanager
def on_console() -> Iterator[None]:
    """Show the messages of singer and the warnings of all libraries on stderr until the block ends."""
    global _screen
    root, before = logging.getLogger(), _screen
    _once.clear()
    level = root.level
    _screen = _Screen()
    if before is not None:
        root.removeHandler(before)
    root.addHandler(_screen)
    logging.captureWarnings(True)
    hook = threading.excepthook
    threading.excepthook = partial(_thread_ended, hook)
    try:
        yield
    finally:
        root.removeHandler(_screen)
        root.setLevel(level)
        _screen = before
        threading.excepthook = hook
        if before is None:
            logging.captureWarnings(False)
            logger.setLevel(logging.INFO)
        else:
            root.addHandler(before)


def _thread_ended(hook: Callable[[threading.ExceptHookArgs], object], ended: threading.ExceptHookArgs) -> None:
    """Say in one line that the disk or the network ended a thread of a library, such as the writer of TensorBoard."""
    if isinstance(ended.exc_value, OSError):
        logger.warning("a thread of a library has ended: %s", ended.exc_value.strerror or ended.exc_value)
    else:
        hook(ended)


def be_verbose() -> None:
    """Show singer's debug messages, the messages of libraries, and whole tracebacks, too."""
    logger.setLevel(logging.DEBUG)
    logging.getLogger().setLevel(logging.INFO)
    if _screen is not None and rank() == 0:
        _screen.setLevel(logging.DEBUG)


def adopt_libraries() -> None:
    """Let the console's handler show messages that libraries (torch, huggingface_hub) otherwise print themselves.

    Outside of on_console() this does nothing.
    """
    if _screen is None:
        return
    for known in list(logging.Logger.manager.loggerDict.values()):
        if isinstance(known, logging.Logger):
            for handler in list(known.handlers):
                if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                    known.removeHandler(handler)
                    known.propagate = True


class _File(logging.FileHandler):
    """A log file, which begins with `header()` when it is opened. A full disk stops the log, not the work."""

    def __init__(self, path: Path, level: int, header: Callable[[], str]) -> None:
        # Names of files may have bytes that are no UTF-8.
        super().__init__(path, "a", encoding="utf-8", errors="backslashreplace", delay=level > logging.INFO)
        self.path, self._header = path, header
        self.setLevel(level)
        self._places: set[str] = set()
        form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
        self.setFormatter(form)
        if level <= logging.INFO:
            self._begin()

    def _begin(self) -> None:
        begin, self._header = self._header, str
        if text := begin():
            self.note(text, logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_ours(record):
            place = f"{record.pathname}:{record.lineno}: {_text(record)}"
            if place in self._places:
                return
            self._places.add(place)
        if self.stream is None:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._begin()
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def note(self, text: str, level: int) -> None:
        """Write to this file alone, whatever its level."""
        self.handle(logging.LogRecord(logger.name, level, "", 0, text, None, None))


_open: list[_File] = []


def log_header(config: str | None = None) -> str:
    """Return the first lines of a command's log. config: the resolved configuration as YAML."""
    lines = [
        f"command: {command_line()}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"machine: {machine()}",
        *([] if config is None else ["configuration:", config.rstrip()]),
    ]
    return "\n".join(lines)


@contextmanager
def log_file(path: Path, header: Callable[[], str] = str, level: int = logging.DEBUG) -> Iterator[None]:
    """Add messages to a file until the block ends, and the error that ends it, if one does.

    header: returns the first lines. level: with WARNING, the file appears with the first warning or error.
    """
    file = _File(path, level, header)
    # A command also logs the messages of libraries; a program that uses singer has its own place for those.
    top = logging.getLogger() if _screen is not None else logger
    adopt_libraries()
    if not _open:
        _once.clear()
    top.addHandler(file)
    _open.append(file)
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and is_defect(error):
            keep_traceback(error)
        if file.stream is not None:
            file.note(f"ended by {type(error).__name__}: {' '.join(str(error).split())}", logging.ERROR)
        raise
    finally:
        top.removeHandler(file)
        _open.remove(file)
        file.close()


def keep_traceback(error: BaseException) -> Path:
    """Write an error's whole traceback, unless it has been written. Return the file that holds it.

    The file is the innermost open log file, or a new one among the temporary files of the system.
    """
    known = vars(error).get(_KEPT)
    if known is None:  # the first log file that catches it is the innermost one
        # A traceback has only the calls that the error has passed so far; the outer ones are added.
        calls = "".join(traceback.format_stack(sys._getframe(1)))
        text = f"Calls:\n{calls}{''.join(traceback.format_exception(error)).rstrip()}"
        if _open:
            known = _open[-1].path
            _open[-1].note(text, logging.ERROR)
        else:
            number, name = tempfile.mkstemp(prefix="singer-", suffix=".log")
            os.close(number)
            known = Path(name)
            file = _File(known, logging.DEBUG, log_header)
            file.note(text, logging.ERROR)
            file.close()
        vars(error)[_KEPT] = known
    return Path(known)


def show_traceback(error: BaseException) -> None:
    """Print the innermost frames of an error's traceback, or with --verbose all of it."""
    verbose = _screen is not None and _screen.level <= logging.DEBUG
    lines = traceback.format_exception(error, limit=None if verbose else -_FRAMES)
    print("".join(lines).rstrip(), file=sys.stderr)


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(sys.argv)
