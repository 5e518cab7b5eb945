"""A rank that dies, stops or hangs: the others end with one line that names it."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pipeline.ranks import SECONDS, Ranks, _Watched, limit_seconds
from singer.errors import UserError

LIMIT = 6.0
_processes = get_context("forkserver")
_processes.set_forkserver_preload(["pipeline.ranks"])


def dead(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hanging(ranks: Ranks) -> None:
    threading.Event().wait()


def hanging_together(ranks: Ranks) -> None:
    with ranks.together():
        threading.Event().wait()


def slow(ranks: Ranks) -> None:
    """Work for longer than the limit, but step by step."""
    for step in range(6):
        time.sleep(LIMIT / 4)
        ranks.step(f"step {step}")


def slow_checkpoint(ranks: Ranks) -> None:
    with ranks.slow():
        time.sleep(1.5 * LIMIT)


Fate = Callable[[Ranks], None]


def work(
    rank: int, world: int, victim: int, fate: Fate, places: list[tuple[Connection, Connection]], err: Path
) -> None:
    """Three steps, each with what stands for a collective operation; the victim meets its fate after the second."""
    os.environ[SECONDS] = str(LIMIT)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)

    def share(place: tuple[int, str]) -> tuple[int, str]:
        if rank:
            port, token = places[rank][0].recv()
            return port, token
        for _, send in places[1:]:
            send.send(place)
        return place

    with _Watched("distill", rank, world, share) as ranks:
        for step in range(3):
            ranks.step(f"step {step}")
            if step == 2 and rank == victim:
                fate(ranks)
            ranks.beat()
            ranks.wait()


def run(folder: Path, world: int, victim: int, fate: Fate) -> tuple[dict[int, int | None], list[str]]:
    """Exit codes of all but a victim that never ends, and what was said."""
    places = [_processes.Pipe(duplex=False) for _ in range(world)]
    errs = [folder / str(rank) for rank in range(world)]
    started = [
        _processes.Process(target=work, args=(rank, world, victim, fate, places, errs[rank])) for rank in range(world)
    ]
    for process in started:
        process.start()
    for rank, process in enumerate(started):
        if rank != victim or fate in (slow, slow_checkpoint):
            process.join(150)
    codes = {rank: p.exitcode for rank, p in enumerate(started) if rank != victim or fate in (slow, slow_checkpoint)}
    for process in started:
        process.kill()
        process.join()
    return codes, [line for err in errs if err.exists() for line in err.read_text().splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "victim", "fate", "why"),
    [
        (2, 1, dead, "is dead"),
        (3, 0, dead, "is dead"),
        (2, 1, stopped, "has not answered for"),
        (3, 0, stopped, "has not answered for"),
        (3, 2, hanging, "has made no progress for"),
        (2, 0, hanging, "has made no progress for"),
        (2, 1, hanging_together, "has made no progress for"),
    ],
)
def test_others_name_it_and_end(tmp_path: Path, world: int, victim: int, fate: Fate, why: str) -> None:
    codes, said = run(tmp_path, world, victim, fate)
    assert codes == {rank: 2 for rank in range(world) if rank != victim}, said
    (line,) = said
    assert line.startswith(f"error: rank {victim} on {socket.gethostname()} {why}"), line
    # One that dies at once has not said yet that it came to the last step.
    assert re.search("last seen at step [12] of distill; this run ends. Continue it with --resume", line)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fate", [slow, slow_checkpoint])
def test_slow_rank_lives(tmp_path: Path, fate: Fate) -> None:
    assert run(tmp_path, 2, 1, fate) == ({0: 0, 1: 0}, [])


def test_limit_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS, "soon")
    with pytest.raises(UserError, match="SINGER_RANK_SECONDS is 'soon'"):
        limit_seconds()
