"""Sweeps with several workers: the same students as one, whoever dies."""

import fcntl
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import ROOT, RUNS, run, run_whole, students, write

import pipeline.sweeps.jobs as work
from pipeline.config import Config
from pipeline.runtime.failures import Failure
from pipeline.stages.distill import fan_out
from pipeline.sweeps.jobs import Job, Member, SweepContext
from pipeline.sweeps.run import gpus
from pipeline.sweeps.worker import Worker
from pipeline.training.distilling.runs import StudentSpec
from pipeline.training.run_directory import DistillResult
from singer.errors import UserError


@pytest.fixture(scope="module")
def file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(world, tmp_path_factory.mktemp("file") / "s.yaml", "distill.checkpoint_minutes=1e-9", runs=RUNS)


@pytest.fixture(scope="module")
def whole(world: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted sweep in this process; tests only read it."""
    return run_whole(world, file, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Path, Path]:
    """(a Python whose workers wait where they have written a checkpoint, as long as this file exists, the file)."""
    python, gate = tmp_path / "python", tmp_path / "gate"
    gate.touch()
    python.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.training.checkpoint import Checkpoint\n"
        "save = Checkpoint.save\n"
        "def waits(*args, **options):\n"
        "    save(*args, **options)\n"
        f"    while Path({str(gate)!r}).exists():\n"
        "        time.sleep(0.01)\n"
        "Checkpoint.save = waits\n"
        # Given are -P, -m, the module and its arguments.
        "sys.modules.pop('pipeline.sweeps.worker', None)\n"
        "sys.argv[1:4] = []\n"
        "runpy.run_module('pipeline.sweeps.worker', run_name='__main__')\n"
    )
    python.chmod(0o755)
    return python, gate


@pytest.mark.slow
def test_two_workers_killed_and_resumed_give_the_same_students(
    world: Path, file: Path, whole: Path, tmp_path: Path, waiting: tuple[Path, Path]
) -> None:
    """kill -9 of the sweep takes its workers along; what they were at goes on, in this process."""
    out = tmp_path / "out"
    program = f"import sys; sys.executable = {str(waiting[0])!r}; import cli; cli.main()"
    command = [sys.executable, "-c", program, "sweep", file, "--cache", world / "cache", "--out", out, "--workers", 2]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    runs = out / "runs"
    try:
        while len(list(runs.glob("*/checkpoint.pt"))) < 2 and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    assert "on worker 0" in told and "on worker 1" in told
    assert not students(out)
    # The locks of its workers are free as soon as they are gone.
    while any(is_held(lock) for lock in runs.glob(".*.lock")):
        time.sleep(0.01)
    result = run(world, file, out, "resume")
    assert result.done == 4 and students(out) == students(whole)


def is_held(lock: Path) -> bool:
    try:
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


@pytest.mark.slow
def test_two_workers(
    world: Path,
    file: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same bytes as one, and every job done once."""
    out = tmp_path / "out"
    result = run(world, file, out, workers=2, probed=True)
    assert result.done == 4 and students(out) == students(whole)
    refiner = "refiners/clip-standardize/refiner.safetensors"
    assert (out / refiner).read_bytes() == (whole / refiner).read_bytes()
    for name in ("mse", "raw1"):
        (mine,), (theirs,) = ((o / "runs" / name).glob("evaluate-*.json") for o in (out, whole))
        mine_value, theirs_value = (json.loads(f.read_text()) | {"seconds": 0} for f in (mine, theirs))
        assert mine.name == theirs.name and mine_value == theirs_value
    jobs = [line for line in capsys.readouterr().err.splitlines() if ": on worker " in line]
    assert sorted(line.split(": on worker ")[0] for line in jobs) == [
        "cosine", "mse", "raw0", "raw1", "refiner clip-standardize",
    ]  # fmt: skip
    assert {line[-1] for line in jobs} == {"0", "1"}


def test_a_worker_that_dies_fails_its_run(
    world: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = run(world, file, tmp_path / "out", workers=2)
    died = r"its process died \(exit code 1\); see worker-\d.log"
    assert result.done == 0 and all(re.search(died, error) for error in result.failed.values())
    assert set(result.failed) == {"mse", "cosine", "raw0", "raw1"}


@pytest.mark.slow
def test_members_of_a_pass_outlive_their_worker(
    world: Path,
    file: Path,
    whole: Path,
    tmp_path: Path,
    waiting: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed with three students on it, they go on one by one, and end as if nothing had been."""
    (python, gate), out, do, killers = waiting, tmp_path / "out", Worker.do, []

    def kill(worker: Worker, names: list[str]) -> None:
        while not any((out / "runs" / name / "checkpoint.pt").exists() for name in names):
            time.sleep(0.01)
        assert worker._process is not None
        worker._process.kill()
        gate.unlink()

    def watched(self: Worker, job: Job) -> dict[str, str]:
        if len(job.members) == 3:
            killers.append(threading.Thread(target=kill, args=(self, [m.name for m in job.members]), daemon=True))
            killers[0].start()
        return do(self, job)

    monkeypatch.setattr(Worker, "do", watched)
    monkeypatch.setattr(sys, "executable", str(python))
    tree = yaml.safe_load(file.read_text())
    result = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 4}), out, workers=2)
    killers[0].join()
    assert result.failed == {} and students(out) == students(whole)
    told = capsys.readouterr().err
    assert re.search(r"its process died \(signal 9\); see worker-\d.log; they now train one by one", told)


def test_the_member_that_kills_its_worker_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "import json, os, sys\nfor line in sys.stdin:\n"
    answer += "    names = [m['name'] for m in json.loads(line).get('members', ())]\n"
    answer += "    'bad' in names and os._exit(7)\n    names and print(json.dumps({}), flush=True)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", answer], **options))
    worker = Worker(SweepContext([tmp_path], tmp_path, None, [], [], []), None, 1, tmp_path / "log")
    members = tuple(Member(name, Config()) for name in ("a", "bad", "b"))
    assert worker.do(Job("run", members)) == {"bad": Failure("its process died (exit code 7); see log", defect=True)}
    worker.kill()
    assert set(worker.do(Job("run", members[::2]))) == {"a", "b"}, "what was killed stays so"
    worker.close()


def test_one_worker_a_gpu(world: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child sees its own GPU alone, as the parent's CUDA_VISIBLE_DEVICES calls it."""
    seen: list[str] = []

    def popen(*args: Any, env: dict[str, str], **options: Any) -> None:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        run(world, file, tmp_path / "out")
    assert seen and set(seen) <= {"3", "GPU-ab"}
    assert gpus() == ["3", "GPU-ab"]


@pytest.mark.slow
def test_students_that_train_together(
    world: Path, file: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one pass they are the same, and one that cannot be trained takes no other along."""
    tree = yaml.safe_load(file.read_text())
    out = tmp_path / "out"
    result = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 4}), out)
    assert result.failed == {} and students(out) == students(whole)
    tree["runs"].append({"name": "bad", "set": {"distill.seed": 1}})

    def fails(specs: list[StudentSpec], *args: Any) -> list[DistillResult]:
        if any(spec.out.name == "bad" for spec in specs):
            raise UserError("it is bad")
        return fan_out(specs, *args)

    monkeypatch.setattr(work, "fan_out", fails)
    again = run(world, write(world, tmp_path / "s.yaml", **{**tree, "together": 9}), tmp_path / "again")
    assert set(again.failed) == {"bad"} and again.done == 4
    assert students(tmp_path / "again") == students(whole)
