"""Commands in several processes on the CPU that find each other as torchrun's do.

They are forked from one process that has imported everything: imports would take longer than what is tested.
"""

import itertools
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import cli

_server = get_context("forkserver")
_server.set_forkserver_preload(["pipeline.cache_teacher", "pipeline.refine", "pipeline.distill"])


def launch(count: int, *args: object, environment: Mapping[str, str] | None = None) -> tuple[dict[str, object], str]:
    """`singer ARGS --json`; the JSON object that it prints, and what it says besides."""
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
            _server.Process(
                target=_run, args=(words, place | {"RANK": str(n), "LOCAL_RANK": str(n)}, *files[n]), daemon=True
            )
            for n in range(count)
        ]
        for rank in ranks:
            rank.start()
        while running := [r for r in ranks if r.exitcode is None]:
            wait([r.sentinel for r in running], 1)
            if any(r.exitcode for r in ranks):
                break  # the others wait for the one that failed
        for rank in ranks:
            rank.kill()
            rank.join()
        said, told = ("".join(file.read_text() for file in of_all) for of_all in zip(*files, strict=True))
    assert [rank.exitcode for rank in ranks] == [0] * count, told
    assert said.count("\n") == 1, "only the first process speaks"
    value = json.loads(said)
    assert isinstance(value, dict)
    return value, told


def _run(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ |= environment
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = words
    try:
        cli.main()
    except SystemExit as stop:
        raise SystemExit(stop.code or 0) from None
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
