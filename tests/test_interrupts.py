"""Ctrl-C or a full disk ends every command with the command that goes on, which works as it is printed."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import run_singer, world_config

from pipeline.config import dump_config
from pipeline.runtime import interrupts
from pipeline.runtime.interrupts import command_to_go_on
from pipeline.storage.atomic import write_atomic

# {command: (what is interrupted after the output was claimed, its words)}
LONG: dict[str, tuple[str, tuple[object, ...]]] = {
    "prepare": ("pipeline.stages.prepare.pack", ("W/images/train", "--out", "O")),
    "cache-teacher": ("pipeline.stages.cache_teacher.fill_segments", ("--images", "W/train", "--out", "O", "C")),
    "refine": ("pipeline.stages.refine.measure_blocks", ("--cache", "W/cache", "--out", "O", "C")),
    "distill": ("pipeline.stages.distill.train_students", ("--cache", "W/cache", "--out", "O", "C")),
    "evaluate": ("pipeline.stages.evaluate.list_probe_images", ("W/teacher", "--test", "W/test", "--train", "W/train")),
    "embed": ("pipeline.stages.embed.feature_batches", ("W/teacher", "W/test", "--out", "O.npy", "C")),
    "run": ("pipeline.chains.run.measure_costs", ("W/images/train", "--out", "O", "C")),
}  # fmt: skip


# {what ends a command: (the error, the exit code, what it says)}
ENDS: dict[str, tuple[BaseException, int, str]] = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "error: interrupted"),
    "full": (
        OSError(errno.ENOSPC, "No space left on device", "x"),
        2,
        "error: No space left on device (x); make room there (df -h and df -i show what is left), then",
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", LONG)
def test_the_command_that_is_printed_goes_on(
    name: str, end: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error, code, says = ENDS[end]
    place, words = LONG[name]
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(world_config(world, "distill.epochs=1", "refine.cleaner=neighbour")))
    given = [str(w).replace("W/", f"{world}/").replace("O", f"{tmp_path}/out") for w in words if w != "C"]
    given += ["--config", str(config)] if "C" in words else []

    def stop(*_: Any, **how: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        assert run_singer(patch, name, *given) == code
    err = capfd.readouterr().err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and said.startswith(says) and "go on with: singer " in said
    again = shlex.split(said.partition("go on with: ")[2])[1:]
    if name == "run":  # test_run kills it at every stage
        assert again[-1] == "--resume"
    elif name == "evaluate":  # it takes long, and writes nothing before its end
        assert again == [name, *given]
    else:
        assert run_singer(monkeypatch, *again) == 0


@pytest.mark.parametrize(
    ("words", "begun", "again"),
    [
        ("distill --out a --overwrite", True, "distill --out a --resume"),
        ("distill --out a --overwrite", False, "distill --out a --overwrite"),
        ("distill --out 'a b' --resume", True, "distill --out 'a b' --resume"),
        ("cache-teacher --append --out a", True, "cache-teacher --append --out a"),
    ],
)
def test_the_options_that_go_on(words: str, begun: bool, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["singer", *shlex.split(words)])
    monkeypatch.delenv("RANK", raising=False)
    assert command_to_go_on(begun, ("--resume", "--overwrite")) == f"singer {again}"
    monkeypatch.setattr("sys.argv", ["cli.py", *shlex.split(words)])
    assert command_to_go_on(begun, ("--resume",)) == f"python cli.py {again}"
    monkeypatch.setenv("RANK", "0")
    assert command_to_go_on(begun, ("--resume",)) == f"accelerate launch cli.py {again}"


def test_a_program_that_is_not_on_the_path_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "singer").touch()
    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "singer"), "demo"])
    monkeypatch.delenv("RANK", raising=False)
    for elsewhere in ("/elsewhere/singer", None):
        monkeypatch.setattr(interrupts.shutil, "which", lambda _, found=elsewhere: found)
        assert command_to_go_on(False, ()) == f"{tmp_path}/bin/singer demo"
    monkeypatch.setattr(interrupts.shutil, "which", lambda _: f"{tmp_path}/bin/singer")
    assert command_to_go_on(False, ()) == "singer demo"


@pytest.mark.parametrize("file", ["provenance.json", "config.yaml"])
def test_a_disk_that_is_full_from_the_start(
    file: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder with a provenance and no configuration, or with nothing, is the command's own, and it goes on there."""

    def full(path: Path, *parts: bytes) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, *parts)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.local.write_atomic", full)
        assert run_singer(patch, "prepare", world / "images" / "test", "--out", tmp_path / "out") == 2
    again = shlex.split(capfd.readouterr().err.partition("go on with: ")[2])[1:]
    assert again[-1] == "--overwrite" and run_singer(monkeypatch, *again) == 0


# A command that writes an output, works for a minute, and needs as long to end. argv: the file that says it works.
WORKS = """
import signal, sys, time
from pathlib import Path
import cli, pipeline
from pipeline.runtime.interrupts import output_begun
begun = Path(sys.argv.pop(1))
# As a shell starts a command, whatever started the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN if "ignored" in begun.name else signal.SIG_DFL)
def work(*_):
    output_begun()
    try:
        begun.touch()
        time.sleep(1 if "ignored" in begun.name else 60)
    finally:
        Path(f"{begun}-ends").touch()
        time.sleep(60 * ("twice" in begun.name))
    return {"done": 1}
pipeline.rank = work
cli.main()
"""


@pytest.mark.parametrize(
    ("name", "signals", "code", "says"),
    [
        ("terminated", [signal.SIGTERM], 143, "error: ended by SIGTERM; go on with: "),
        ("hung-up", [signal.SIGHUP, signal.SIGHUP], 129, "error: ended by SIGHUP; go on with: "),
        ("twice", [signal.SIGINT, signal.SIGINT], 130, "error: interrupted; go on with: "),
        ("ignored", [signal.SIGHUP], 0, ""),
    ],
)
def test_signals_that_end_a_command(
    name: str, signals: list[int], code: int, says: str, world: Path, tmp_path: Path
) -> None:
    """The end of a job or of a terminal is told like Ctrl-C; a second Ctrl-C waits for nothing; nohup is left alone."""
    begun = tmp_path / name
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    command = [sys.executable, "-c", WORKS, str(begun), "rank", str(world / "cache")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    for number, file in zip(signals, (begun, begun.with_name(f"{name}-ends")), strict=False):
        while not file.exists() and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.startswith(says) and len(err.splitlines()) == bool(says), err
