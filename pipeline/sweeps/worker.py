"""A process that does the jobs of a sweep, one after the other.

It reads jobs as JSON lines from stdin and writes answers as JSON lines to stdout; its log is stderr.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from pydantic import TypeAdapter

from pipeline.runtime.failures import Failure
from pipeline.runtime.logs import log_file
from pipeline.runtime.progress import say
from pipeline.sweeps.jobs import Job, SweepContext, attempt

_SETTING, _JOB, _ANSWER = TypeAdapter(SweepContext), TypeAdapter(Job), TypeAdapter(dict[str, Failure])


class Worker:
    """A worker process, as the sweep sees it; it starts with its first job, and again after it died.

    device: its CUDA_VISIBLE_DEVICES, or None to leave the variable unchanged; threads: its number of CPU threads; log:
    the file to which its messages are appended.
    """

    def __init__(self, setting: SweepContext, device: str | None, threads: int, log: Path) -> None:
        self._setting, self._log = setting, log
        # Without this limit, each process would start a thread for every core of the machine.
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if device is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = device
        self._process: subprocess.Popen[str] | None = None
        self._killed = False

    def do(self, job: Job) -> dict[str, Failure]:
        """Do a job as attempt() does, in the process.

        If the process dies in a job with several members, each member is continued alone, from its last checkpoint. If
        it dies in a job with one member, this is the member's failure.
        """
        if self._process is None:
            self._process = self._start()
        if self._killed:  # kill() may have run in another thread while the process started
            self._process.kill()
        _send(self._process, _JOB.dump_json(job))
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if answer:
            return _ANSWER.validate_json(answer)
        code = self._end(self._process)
        error = f"its process died ({'signal' if code < 0 else 'exit code'} {abs(code)}); see {self._log.name}"
        if len(job.members) == 1 or self._killed:
            # Death by a signal is not a defect: the system sends it, most often because memory is short.
            return {member.name: Failure(error, defect=code > 0) for member in job.members}
        say(f"{job.names}: {error}; they now train one by one")
        failed: dict[str, Failure] = {}
        for member in job.members:
            failed |= self.do(replace(job, members=(member,)))
        return failed

    def kill(self) -> None:
        """End the process at once and for good; another thread may be waiting for its answer."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process and free its resources; no other thread may be using it."""
        self.kill()
        if self._process is not None:
            self._end(self._process)

    def _end(self, process: subprocess.Popen[str]) -> int:
        process.communicate()
        self._process = None
        return process.returncode

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps Python from importing a folder "pipeline" of the user's in the current folder.
        command = [sys.executable, "-P", "-m", __name__, str(self._log)]
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        _send(process, _SETTING.dump_json(self._setting))
        return process


def _send(process: subprocess.Popen[str], line: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # the process has died, which do() sees when there is no answer
        process.stdin.write(line.decode() + "\n")
        process.stdin.flush()


def main() -> None:
    """Work until stdin ends.

    It also ends when the sweep is killed, so that no worker still writes to the sweep's folders then.
    """
    # The sweep gets these, too, and ends its workers; one that ended by itself would count as a run that failed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that a library's prints go to the log and not among the answers
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    setting = _SETTING.validate_json(lines.get())
    _, log = sys.argv
    sys.argv = setting.command
    with log_file(Path(log)):
        while True:
            failed = attempt(setting, _JOB.validate_json(lines.get()))
            answers.write(_ANSWER.dump_json(failed).decode() + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
