"""The scheduler of a sweep: it gives every job to one worker, and runs only after the refiner that they need."""

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.runtime.failures import Failure
from pipeline.runtime.progress import duration, say
from pipeline.sweeps.jobs import Job


class Scheduler:
    """The waiting jobs, shared by the threads that serve the workers.

    done: the number of finished runs; failed: {run: failure}; changed: called after every job that ends, by one thread
    at a time.
    """

    def __init__(self, jobs: Sequence[Job], done: int, changed: Callable[[dict[str, Failure]], None]) -> None:
        self._waiting = list(jobs)
        self._unfitted = {job.names for job in jobs if job.kind == "refiner"}
        self._changed = changed
        self._condition = threading.Condition()
        self._stopped = False
        self._started = time.monotonic()
        self._first = self.done = done
        self._runs = done + sum(len(job.members) for job in jobs if job.kind == "run")
        self.failed: dict[str, Failure] = {}

    def serve(self, do: Callable[[Job], dict[str, Failure]], where: str) -> None:
        """Do jobs at one place until none is left; any exception here ends the sweep, and so does a full disk.

        do: does a job and returns the failures of its members; where: the place in words.
        """
        try:
            while (job := self._take()) is not None:
                what = job.names if job.kind == "run" else f"refiner {job.names}"
                say(f"{what}: on {where}")
                started = time.monotonic()
                failed = do(job)
                self._finish(job, what, failed, time.monotonic() - started)
                for failure in failed.values():
                    if failure.full:  # the others would train for hours, and could not be stored either
                        raise OSError(errno.ENOSPC, failure.message)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Give out no more jobs, and ignore the results of jobs that are running."""
        with self._condition:
            self._stopped = True
            self._waiting.clear()
            self._condition.notify_all()

    def _take(self) -> Job | None:
        """Wait for a job that can begin, and return it, or None if no job is left."""
        with self._condition:
            while self._waiting:
                for job in self._waiting:
                    if not {m.needs for m in job.members} & self._unfitted:
                        self._waiting.remove(job)
                        return job
                self._condition.wait()
            return None

    def _finish(self, job: Job, what: str, failed: dict[str, Failure], seconds: float) -> None:
        with self._condition:
            if self._stopped:
                return
            if job.kind == "refiner":
                self._unfitted.discard(job.names)
                for name, error in failed.items():
                    self._drop(name, error)
            else:
                self.failed |= failed
                self.done += len(job.members) - len(failed)
            kind = "refiner " if job.kind == "refiner" else ""
            told = "; ".join(f"{kind}{name} failed: {e.message}" for name, e in failed.items())
            say(f"{told or f'{what}: {seconds:.0f} s'}; {self._progress()}")
            self._changed(self.failed)
            self._condition.notify_all()

    def _drop(self, refiner: str, error: Failure) -> None:
        """Mark the runs that wait for a refiner as failed, because it cannot be fitted."""
        waiting = []
        for job in self._waiting:
            kept = tuple(m for m in job.members if m.needs != refiner)
            of_refiner = replace(error, message=f"refiner {refiner}: {error.message}")
            self.failed |= {m.name: of_refiner for m in job.members if m.needs == refiner}
            if kept:
                waiting.append(replace(job, members=kept))
        self._waiting = waiting

    def _progress(self) -> str:
        text = f"{self.done} of {self._runs} runs are done"
        left = self._runs - self.done - len(self.failed)
        if self.failed:
            text += f", {len(self.failed)} failed"
        if left and self.done > self._first:
            # The time so far includes refiners and failures, and is divided by the runs that it finished.
            each = (time.monotonic() - self._started) / (self.done - self._first)
            text += f", about {duration(each * left)} left"
        return text
