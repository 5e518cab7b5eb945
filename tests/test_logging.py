"""The log of each output, what the console shows, and that neither changes what is made."""

import logging
import os
import pty
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import run_singer, tree_bytes

from pipeline.cache.info import cache_info
from pipeline.config import Config
from pipeline.outputs.stage_log import process_log, stage_log
from pipeline.runtime import progress
from pipeline.runtime.logs import LOG, is_log, log_file, logger, on_console
from pipeline.runtime.progress import say
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify


def refine(world: Path, config_file: Path, out: Path, *more: str) -> list[object]:
    return ["refine", "--cache", world / "cache", "--out", out, "--cleaner", "clip", "--config", config_file, *more]


def test_a_log_has_all_that_a_report_of_a_defect_needs(
    world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapters"
    assert run_singer(monkeypatch, *refine(world, config_file, out)) == 0
    text = (out / LOG).read_text()
    for part in ("command: singer refine --cache", "versions: python 3", "torch ", "CPU cores", "GB of memory"):
        assert part in text
    assert "configuration:" in text and "cleaner: clip" in text
    assert "T" in text.split()[0] and ":" in text.split()[0]  # a time stamp
    assert run_singer(monkeypatch, *refine(world, config_file, out, "--overwrite")) == 0
    assert (out / LOG).read_text().count("command: ") == 1


def test_resuming_appends(world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "adapters"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.refine._store", _bursts)
        assert run_singer(patch, *refine(world, config_file, out)) == 1
    assert run_singer(monkeypatch, *refine(world, config_file, out, "--resume")) == 0
    text = (out / LOG).read_text()
    assert text.count("command: ") == 2 and text.index("KeyError") < text.rindex("command: ")


def _bursts(*args: object) -> None:
    np.zeros(3).reshape(2, 2) if len(args) == 0 else {}["no such thing"]


@pytest.mark.parametrize("kind", ["numpy's ValueError", "a KeyError"])
def test_a_defect_is_short_on_the_console_and_whole_in_the_log(
    kind: str,
    world: Path,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def bursts(*args: object) -> None:
        if kind == "a KeyError":
            raise KeyError("no such thing")
        np.zeros(3).reshape(2, 2)

    monkeypatch.setattr("pipeline.stages.refine._store", bursts)
    out = tmp_path / "adapters"
    assert run_singer(monkeypatch, *refine(world, config_file, out)) == 1
    *shown, last = capfd.readouterr().err.strip().splitlines()
    assert "this is a defect of singer" in last and str(out / LOG) in last
    assert len(shown) < 20 and "bursts" in "\n".join(shown)
    text = (out / LOG).read_text()
    assert "Traceback" in text and "in bursts" in text and text.count("Traceback") == 1
    # The console has the innermost frames alone, unless it is asked for all.
    assert "in run_with_messages" in text and "in run_with_messages" not in "\n".join(shown)
    assert run_singer(monkeypatch, "--verbose", *refine(world, config_file, out, "--overwrite")) == 1
    assert "in run_with_messages" in capfd.readouterr().err


def test_a_defect_without_an_output_has_a_log_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.cache.info._views", _bursts)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_singer(monkeypatch, "cache", "info", world / "cache") == 1
    (log,) = tmp_path.glob("singer-*.log")
    assert str(log) in capfd.readouterr().err
    assert "in _bursts" in log.read_text() and "command: singer cache info" in log.read_text()


def test_a_log_is_no_part_of_a_cache(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    cache_teacher(config, str(world / "train" / "*.tar"), place)
    assert (place / LOG).is_file() and tree_bytes(place) == tree_bytes(world / "cache", "provenance.json") | {
        "provenance.json": (place / "provenance.json").read_bytes()
    }
    before = cache_info(place).bytes
    (place / "singer-rank1.log").write_text("x")
    assert cache_info(place).bytes == before
    result = verify(config, place)
    assert result.whole and not result.parts[0].files
    (place / "singer.txt").write_text("x")
    assert not verify(config, place).whole


def test_a_folder_with_a_log_alone_is_free_and_a_strangers_is_not_ours(
    world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, strange = tmp_path / "ours", tmp_path / "strange"
    for folder in (ours, strange):
        folder.mkdir()
        (folder / LOG).write_text("what went wrong\n")
    (strange / "thesis.tex").write_text("years of work")
    assert run_singer(monkeypatch, *refine(world, config_file, strange, "--overwrite")) == 2
    assert (strange / "thesis.tex").read_text() == "years of work"
    assert run_singer(monkeypatch, *refine(world, config_file, ours)) == 0
    assert (ours / LOG).read_text().startswith("what went wrong\n")


def test_which_files_are_logs() -> None:
    assert all(map(is_log, ["singer.log", "runs/a/singer.log", "singer-rank12.log"]))
    assert not any(map(is_log, ["log.jsonl", "worker-0.log", "singer.log/x", "my-singer.log"]))


def test_an_object_store_gets_the_log_at_the_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = {LOG: b"before\n"}

    class Memory:
        def read(self, name: str) -> bytes:
            return objects[name]

        def write(self, name: str, *parts: bytes) -> None:
            objects[name] = b"".join(parts)

    monkeypatch.setattr("pipeline.outputs.stage_log.open_store", lambda place: Memory())
    with stage_log("s3://bucket/cache", config):
        say("something")
    text = objects[LOG].decode()
    assert text.startswith("before\n") and "command: " in text and "something" in text


def test_another_process_has_a_file_once_it_has_something_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with on_console():
        with process_log(tmp_path):
            say("all is well")
        assert not list(tmp_path.iterdir())
        with pytest.raises(ZeroDivisionError), process_log(tmp_path):
            _ = 1 // 0
        assert "all is well" not in capfd.readouterr().err
        logger.error("an error")
        assert "error: an error" in capfd.readouterr().err
    (log,) = tmp_path.iterdir()
    assert log.name == "singer-rank1.log" and "ZeroDivisionError" in log.read_text()


def test_warnings_are_shown_once_as_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), on_console(), log_file(tmp_path / LOG):
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # as pytest puts its own in the way
        for _ in range(3):
            warnings.warn("features\nare odd", UserWarning, stacklevel=1)
        warnings.warn("features\nare odd", UserWarning, stacklevel=1)
        for _ in range(2):
            logging.getLogger("timm.models").warning("no such weights")
            logging.getLogger("timm.models").info("looking")
    shown = capfd.readouterr().err.splitlines()
    assert len(shown) == 2, shown
    assert shown[0].startswith("warning: ") and shown[0].endswith("UserWarning: features are odd")
    assert shown[1] == "warning: timm.models: no such weights"
    text = (tmp_path / LOG).read_text()
    # At most once a place: there are two here.
    assert text.count("UserWarning: features") == 2 and text.count("no such weights") == 1


def test_verbose_goes_before_or_after_the_command(
    world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def talks(place: Path) -> dict[str, int]:
        logger.debug("a detail")
        logging.getLogger("timm").info("a library's")
        return {"one": 1}

    monkeypatch.setattr("pipeline.cache.info.cache_info", talks)
    command = ["cache", "info", world / "cache"]
    for args, told in (
        (command, []),
        (["--verbose", *command], ["a detail", "timm: a library's"]),
        ([*command, "--verbose"], ["a detail", "timm: a library's"]),
        (command, []),  # what one command was asked for does not stay
    ):
        assert run_singer(monkeypatch, *args) == 0
        assert capfd.readouterr().err.splitlines() == told


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, cli\n"
        "sys.argv = ['singer', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_a_full_disk_stops_the_log_and_not_the_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with log_file(Path("/dev/full")):
        say("goes on")
    assert capfd.readouterr().err == "goes on\n"


def test_a_thread_that_a_full_disk_ends_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def writes() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("a")

    with on_console():
        thread = threading.Thread(target=writes)
        thread.start()
        thread.join()
    assert capfd.readouterr().err == "warning: a thread of a library has ended: No space left on device\n"


def test_a_line_of_slow_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", -1.0)
    with progress.meter("fit", 1000, "steps") as m:
        m._start -= 100
        m.advance(4)
        m.advance(1996)
    slow, quick = capsys.readouterr().err.splitlines()
    assert slow == "fit: 4/1000, 0.04 steps/s, data wait 0 %, 6 h 55 min left" and "2000/1000, 20 steps/s" in quick


SAYS = """
import sys
from pathlib import Path
import cli
from pipeline.runtime.logs import log_file, logger
def work():
    for number in range(100):
        logger.info(f"message {number} " + "x" * 1000)
    with log_file(Path(sys.argv[1])):
        logger.info("a name \\udcff")
    print("\\xe9 \\udcff")
cli.run_with_messages(work)
"""


BAR = """
import os, signal, sys, time
import cli
from pipeline.runtime.progress import meter
def work():
    with meter("work", 100, "pieces") as m:
        for number in range(100):
            m.advance(1)
            time.sleep(0.02)
            if number == 30:
                open(sys.argv[1], "w").close()
signal.signal(signal.SIGHUP, signal.SIG_IGN)
cli.run_with_messages(work)
"""


def test_a_terminal_that_is_lost_ends_no_work(tmp_path: Path) -> None:
    """With nohup, or in a session that outlives its terminal, a bar cannot be drawn any more."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", BAR, str(tmp_path / "begun")]
    work = subprocess.Popen(command, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    while not (tmp_path / "begun").exists() and work.poll() is None:
        assert os.read(master, 1 << 16)
    os.close(master)
    assert work.wait(60) == 0


def test_what_cannot_be_shown_ends_no_work(tmp_path: Path) -> None:
    """Nobody reads the messages any more, the terminal's encoding lacks a letter, or its width is said to be 0."""
    reader, writer = os.pipe()
    os.close(reader)
    for stderr, names in ((writer, {}), (subprocess.PIPE, {"COLUMNS": "0"})):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", **names}
        command = [sys.executable, "-c", SAYS, str(tmp_path / "log")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True)
        assert (done.returncode, done.stdout) == (0, "\\xe9 \\udcff\n")
    assert len(done.stderr.splitlines()) == 101 and done.stderr.startswith("message 0 xxx")
    os.close(writer)
    assert "a name \\udcff" in (tmp_path / "log").read_text()
