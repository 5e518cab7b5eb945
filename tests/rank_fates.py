"""What ranks do, good and bad, in processes of their own."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.runtime.ranks import SECONDS, Ranks
from pipeline.runtime.watched_rank import WatchedRank

LIMIT = 6.0


def dead(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(ranks: Ranks) -> None:
    # It works on until its step is told, which is at the next tick, a tenth of the limit.
    for _ in range(20):
        ranks.beat()
        time.sleep(LIMIT / 60)
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


Work = Callable[[Ranks], None]


def work(
    rank: int, world: int, victim: int, fate: Work, places: list[tuple[Connection, Connection]], err: Path
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

    with WatchedRank("distill", rank, world, share) as ranks:
        for step in range(3):
            ranks.step(f"step {step}")
            if step == 2 and rank == victim:
                fate(ranks)
            ranks.beat()
            ranks.wait()
