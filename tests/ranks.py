"""Commands in several processes on the CPU that find each other as torchrun's do."""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

from forked import forked

import cli
from pipeline.runtime.watched_rank import WatchedRank


@dataclass(frozen=True)
class Fate:
    """What one rank does instead of its `step`-th report: SIGKILL or SIGSTOP itself, or wait for ever (None)."""

    rank: int
    step: int
    signal: signal.Signals | None


def launch(
    count: int,
    *args: object,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[dict[str, object], str]:
    """`singer ARGS --json`; the JSON object that it prints, and what it says besides.

    before: a function of a module that each process calls first.
    """
    codes, said, told = start(count, *args, environment=environment, before=before)
    assert codes == [0] * count, told
    assert said.count("\n") == 1, "only the first process speaks"
    value = json.loads(said)
    assert isinstance(value, dict)
    return value, told


def start(
    count: int,
    *args: object,
    environment: Mapping[str, str] | None = None,
    fate: Fate | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[list[int | None], str, str]:
    """`singer ARGS --json`; the exit codes, and what is said on stdout and stderr.

    Ends all if one fails; with a fate, when all others have ended.
    """
    # Held until all have ended, so that nobody else is given the port; the first process may listen on it all the same.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true", **(environment or {})}
    words = ["singer", *map(str, args), "--json"]
    with held, TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(count)]
        for file in itertools.chain.from_iterable(files):
            file.touch()
        ranks = [
            forked(_run, words, place | {"RANK": str(n), "LOCAL_RANK": str(n)}, *files[n], fate, before)
            for n in range(count)
        ]
        for rank in ranks:
            rank.start()
        others = [r for n, r in enumerate(ranks) if fate is None or n != fate.rank]
        while running := [r for r in others if r.exitcode is None]:
            wait([r.sentinel for r in running], 1)
            if fate is None and any(r.exitcode for r in ranks):
                break  # the others wait for the one that failed
        for rank in ranks:
            rank.kill()
            rank.join()
        said, told = ("".join(file.read_text() for file in of_all) for of_all in zip(*files, strict=True))
    return [rank.exitcode for rank in ranks], said, told


def _run(
    words: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    fate: Fate | None,
    before: Callable[[], None] | None,
) -> None:
    os.environ |= environment
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = words
    if fate is not None and environment["RANK"] == str(fate.rank):
        _await(fate)
    if before is not None:
        before()
    try:
        cli.main()
    except SystemExit as stop:
        raise SystemExit(stop.code or 0) from None
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _await(fate: Fate) -> None:
    steps, report = itertools.count(1), WatchedRank.step

    def step(self: WatchedRank, where: str) -> None:
        if next(steps) < fate.step:
            report(self, where)
        elif fate.signal is None:
            threading.Event().wait()
        else:
            os.kill(os.getpid(), fate.signal)

    WatchedRank.step = step  # type: ignore[method-assign]
