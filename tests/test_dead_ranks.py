"""A rank that dies, stops or hangs: the others end with one line that names it, and --resume goes on."""

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tree_bytes
from ranks import _run, _server, launch

from pipeline.ranks import SECONDS, Status, _Connection, _Watched, limit_seconds
from pipeline.refine import refine
from singer.errors import UserError

LIMIT = 8.0
# Of what a rank does at the chosen moment.
AT, RANK, HOW = "TEST_AT", "TEST_RANK", "TEST_HOW"


def _strike(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """Run a command in which one rank meets its fate when it calls a chosen function for the third time."""
    if environment["RANK"] == environment[RANK]:
        import pipeline.extract
        import pipeline.fit
        import pipeline.train

        place, name = {
            "distill": (pipeline.train, "prepare"),
            "update": (pipeline.train, "learning_rate"),
            "refine": (pipeline.fit, "adapter_losses"),
            "cache-teacher": (pipeline.extract, "normalise"),
        }[environment[AT]]
        real, calls = getattr(place, name), 0

        def fated(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if environment[HOW] == "slow" and calls <= 4:
                time.sleep(0.4 * LIMIT)
            elif calls == 3:
                if environment[HOW] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif environment[HOW] == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif environment[HOW] == "hang":
                    threading.Event().wait()
                elif environment[HOW] == "error":
                    raise UserError("the third call is refused")
            return real(*args, **kwargs)

        setattr(place, name, fated)
    _run(words, environment, out, err)


@dataclass
class Fate:
    """What became of the ranks: exit codes, and what each said."""

    codes: dict[int, int | None] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)


def ranks_with(tmp: Path, count: int, victim: int, at: str, how: str, *args: object) -> Fate:
    """`singer ARGS` on `count` ranks until all but the victim have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), SECONDS: str(LIMIT)}
    place |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", AT: at, RANK: str(victim), HOW: how}
    words = ["singer", *map(str, args), "--json"]
    started: list[BaseProcess] = []
    files = [(tmp / f"{rank}.out", tmp / f"{rank}.err") for rank in range(count)]
    for rank, pair in enumerate(files):
        for file in pair:
            file.write_text("")
        variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(_server.Process(target=_strike, args=(words, variables, *pair), daemon=True))
        started[-1].start()
    fate = Fate()
    try:
        for rank, process in enumerate(started):
            if rank != victim or how in ("kill", "error", "slow"):
                process.join(200)
                fate.codes[rank] = process.exitcode
    finally:
        for process in started:
            process.kill()
            process.join()
    fate.said = {rank: err.read_text() for rank, (_, err) in enumerate(files)}
    return fate


def blamed(fate: Fate) -> list[str]:
    """The lines, by any rank, that say that the run ends."""
    return [line for said in fate.said.values() for line in said.splitlines() if "this run ends" in line]


def stage_args(world: Path, config_file: Path, stage: str, out: Path) -> list[object]:
    inputs: dict[str, list[object]] = {
        # Of 100 records: shards of few, so that each rank has several.
        "cache-teacher": ["--shards", world / "train" / "*.tar"],
        "refine": ["--cache", world / "cache"],
        "distill": ["--cache", world / "cache"],
    }
    return [stage, *inputs[stage], "--out", out, "--config", config_file]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "at", "how", "count", "victim"),
    [
        pytest.param("distill", "distill", "kill", 2, 1, id="distill-kill"),
        pytest.param("distill", "distill", "kill", 3, 0, id="distill-kill-first-of-three"),
        pytest.param("distill", "distill", "stop", 2, 1, id="distill-stop"),
        pytest.param("distill", "distill", "stop", 2, 0, id="distill-stop-first"),
        pytest.param("distill", "distill", "hang", 3, 2, id="distill-hang-of-three"),
        pytest.param("distill", "update", "hang", 2, 1, id="distill-hang-in-update"),
        pytest.param("distill", "distill", "hang", 2, 0, id="distill-hang-first"),
        pytest.param("cache-teacher", "cache-teacher", "kill", 2, 1, id="cache-kill"),
        pytest.param("cache-teacher", "cache-teacher", "stop", 2, 1, id="cache-stop"),
        pytest.param("refine", "refine", "kill", 2, 1, id="refine-kill"),
        pytest.param("refine", "refine", "hang", 2, 1, id="refine-hang"),
    ],
)
def test_others_name_it_and_end(
    world: Path, config_file: Path, tmp_path: Path, stage: str, at: str, how: str, count: int, victim: int
) -> None:
    out = tmp_path / "out"
    args = stage_args(world, config_file, stage, out)
    fate = ranks_with(tmp_path, count, victim, at, how, *args)
    others = {rank: code for rank, code in fate.codes.items() if rank != victim}
    assert others == {rank: 2 for rank in range(count) if rank != victim}, fate
    (line,) = blamed(fate)
    assert line.startswith(f"error: rank {victim} on {socket.gethostname()} "), line
    assert {"kill": "is dead", "stop": "has not answered for", "hang": "has made no progress for"}[how] in line
    assert f" of {stage}; this run ends" in line and "--resume" in line
    assert "Traceback" not in "".join(fate.said.values())

    launch(count, *args, "--resume")
    if stage == "refine":
        name = "refiner.safetensors"
        assert (out / name).read_bytes() == (world / "adapters" / name).read_bytes()
    elif stage == "cache-teacher":
        ignored = ("provenance.json", "config.yaml")
        assert tree_bytes(out, *ignored) == tree_bytes(world / "cache", *ignored)
    else:
        launch(count, *stage_args(world, config_file, stage, tmp_path / "whole"))
        one, two = (safetensors.torch.load_file(p / "student/model.safetensors") for p in (tmp_path / "whole", out))
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, atol=1e-6, rtol=1e-5)
