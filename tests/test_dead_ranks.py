"""A rank that dies, stops or hangs: the others end with one line that names it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path

import pytest
from conftest import tree_bytes
from forked import forked
from rank_fates import Work, dead, hanging, hanging_together, slow, slow_checkpoint, stopped, work
from ranks import Fate, launch, start

from pipeline.runtime.ranks import SECONDS, limit_seconds
from singer.errors import UserError


def run(folder: Path, world: int, victim: int, fate: Work) -> tuple[dict[int, int | None], list[str]]:
    """Exit codes of all but a victim that never ends, and what was said."""
    places = [Pipe(duplex=False) for _ in range(world)]
    errs = [folder / str(rank) for rank in range(world)]
    started = [forked(work, rank, world, victim, fate, places, errs[rank]) for rank in range(world)]
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


CASES: list[tuple[int, int, Work, str]] = [
    (2, 1, dead, "is dead"),
    (3, 0, dead, "is dead"),
    (2, 1, stopped, "has not answered for"),
    (3, 0, stopped, "has not answered for"),
    (3, 2, hanging, "has made no progress for"),
    (2, 0, hanging, "has made no progress for"),
    (2, 1, hanging_together, "has made no progress for"),
    (2, 1, slow, ""),
    (2, 1, slow_checkpoint, ""),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[int, int | None], list[str]]]:
    """What `run` gives for each case. They run at the same time: most of theirs is waiting."""
    folders = [tmp_path_factory.mktemp("ranks") for _ in CASES]
    with ThreadPoolExecutor(len(CASES)) as threads:
        return list(threads.map(lambda folder, case: run(folder, *case[:3]), folders, CASES))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [n for n, case in enumerate(CASES) if case[3]])
def test_others_name_it_and_end(ran: list[tuple[dict[int, int | None], list[str]]], number: int) -> None:
    (world, victim, _, why), (codes, said) = CASES[number], ran[number]
    assert codes == {rank: 2 for rank in range(world) if rank != victim}, said
    (line,) = said
    assert line.startswith(f"error: rank {victim} on {socket.gethostname()} {why}"), line
    # Progress is told at intervals: one that dies at once may not have told its last steps.
    last = "(the start|step [012])" if why == "is dead" else "step [12]"
    assert re.search(f"last seen at {last} of distill; this run ends. Continue it with --resume", line)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [n for n, case in enumerate(CASES) if not case[3]])
def test_slow_rank_lives(ran: list[tuple[dict[int, int | None], list[str]]], number: int) -> None:
    assert ran[number] == ({0: 0, 1: 0}, [])


def test_limit_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS, "soon")
    with pytest.raises(UserError, match="SINGER_RANK_SECONDS is 'soon'"):
        limit_seconds()


_FATES = {"is dead": signal.SIGKILL, "has not answered for": signal.SIGSTOP, "has made no progress for": None}


def _cases() -> list[object]:
    """Every stage with every fate."""
    return [(stage, why) for stage in ("cache-teacher", "refine", "distill") for why in _FATES]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "why"), _cases())
def test_stage_ends_and_resumes(world: Path, config_file: Path, tmp_path: Path, stage: str, why: str) -> None:
    """One of two ranks fails; the other ends with one line, and the same command with --resume ends the work."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    # The world's images are one shard of the cache, which the first rank writes.
    victim, step = {"cache-teacher": (0, 3), "refine": (1, 20), "distill": (1, 5)}[stage]
    inputs: list[object] = {
        "cache-teacher": ["--shards", world / "train" / "*.tar"],
        "refine": ["--cache", world / "cache"],
        "distill": ["--cache", world / "cache", "--set", "distill.checkpoint_minutes=1e-9"],
    }[stage]
    command = [stage, *inputs, "--config", config_file, "--out"]
    codes, _, told = start(2, *command, out, environment={SECONDS: "10"}, fate=Fate(victim, step, _FATES[why]))
    assert codes[1 - victim] == 2, told
    (line,) = re.findall("^error: .*", told, re.M)
    assert line.startswith(f"error: rank {victim} on {socket.gethostname()} {why}"), line
    assert re.search(rf"last seen at .* of {stage}; this run ends. Continue it with --resume", line)
    launch(2, *command, out, "--resume")
    if stage == "distill":
        launch(2, *command, whole)
        names = ["student/model.safetensors", "projectors.safetensors"]
        assert [(out / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]
    elif stage == "refine":
        name = "refiner.safetensors"
        assert (out / name).read_bytes() == (world / "adapters" / name).read_bytes()
    else:
        ignored = ("provenance.json", "config.yaml")
        assert tree_bytes(out, *ignored) == tree_bytes(world / "cache", *ignored)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", ["a rank is killed", "the launcher is told to end"])
def test_under_torchrun(world: Path, config_file: Path, tmp_path: Path, end: str) -> None:
    """torchrun sends SIGTERM to the ranks that are left: the line that names the dead one comes all the same."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parent.parent / "cli.py"), "distill", "--cache", str(world / "cache")]
    command += ["--config", str(config_file), "--set", "distill.checkpoint_minutes=1e-9", "--out", str(out)]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    endless = [*command, "--set", "distill.epochs=100000"]
    with (tmp_path / "said").open("w+") as said:
        launcher = subprocess.Popen(endless, env=variables, stdout=said, stderr=said)
        try:
            while not (out / "log.jsonl").exists():
                assert launcher.poll() is None, said.seek(0) or said.read()
                time.sleep(0.1)
            ranks = _ranks(launcher.pid)
            if end == "a rank is killed":
                os.kill(ranks[1], signal.SIGKILL)
            else:
                launcher.terminate()
            launcher.wait(120)
        finally:
            launcher.kill()
        said.seek(0)
        text = said.read()
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    if end == "a rank is killed":
        assert re.search(
            rf"^error: rank 1 on {socket.gethostname()} is dead, last seen at .* of distill", text, re.M
        ), text
    assert "this is a defect" not in text, text


def _ranks(launcher: int) -> dict[int, int]:
    """{rank: process} of a torchrun."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        (rank,) = (int(v[5:]) for v in variables if v.startswith(b"RANK="))
        found[rank] = int(child)
    return found
