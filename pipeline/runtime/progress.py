"""Progress of long work: a live line on a terminal; elsewhere on stderr and in the log, a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.runtime.logs import console, logger
from pipeline.runtime.ranks import current

_PLAIN_SECONDS = 20.0


class Meter:
    """Counts items, and shows rate, time left and the share of time spent on waiting for data."""

    def __init__(self, what: str, total: int, unit: str, quiet: bool, done: int, busy: Callable[[], bool]) -> None:
        """Start to count. busy: returns whether a device still computes: waiting while it does costs nothing."""
        self._what, self._total, self._unit, self._busy = what, total, unit, busy
        self.done = self._first = done
        self._start = self._shown = time.perf_counter()
        self._quiet = quiet
        self._bar: tuple[Progress, TaskID] | None = None
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data, unless the device was busy all the while."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if not self._busy():
                self.waited += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Return the seconds since the start of this run."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Return items per second since the start of this run."""
        return (self.done - self._first) / max(self.seconds, 1e-9)

    @property
    def wait_percent(self) -> float:
        """Return the share (%) of time spent on waiting for data."""
        return 100 * self.waited / max(self.seconds, 1e-9)

    def advance(self, count: int, note: str = "") -> None:
        """Count items that are finished, and show it. note: text after the figures."""
        self.done += count
        current().step(f"{self._what} {self.done} of {self._total} {self._unit}")
        if self._quiet:
            return
        rate = f"{self.rate:.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        text = f"{rate} {self._unit}/s, data wait {self.wait_percent:.0f} %" + (note and f", {note}")
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=self.done, text=text)
        if time.perf_counter() - self._shown > _PLAIN_SECONDS:
            self._shown = time.perf_counter()
            left = (self._total - self.done) / max(self.rate, 1e-9)
            line = f"{self._what}: {self.done}/{self._total}, {text}, {duration(left)} left"
            # If the console has a live line, this one goes only to the log file.
            logger.info("%s", line, extra={"on_bar": self._bar is not None})


@contextmanager
def meter(
    what: str, total: int, unit: str, *, quiet: bool = False, done: int = 0, busy: Callable[[], bool] = lambda: False
) -> Iterator[Meter]:
    """Show a Meter until the block ends.

    quiet: show nothing; done: items finished by an earlier run; busy: as for Meter.
    """
    m = Meter(what, total, unit, quiet, done, busy)
    try:
        with _shown(m, what, total, done, quiet):
            yield m
    finally:
        current().rest()


@contextmanager
def _shown(m: Meter, what: str, total: int, done: int, quiet: bool) -> Iterator[None]:
    if quiet or not sys.stderr.isatty():
        yield
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        m._bar = progress, progress.add_task(what, total=total, completed=done, text="")
        yield


def say(message: str) -> None:
    """Log a line for the user; a command shows it on stderr and adds it to its log file."""
    logger.info("%s", message)


def duration(seconds: float) -> str:
    """Format seconds: 5000 -> 1 h 23 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
