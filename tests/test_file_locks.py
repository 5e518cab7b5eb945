"""Folders are locked also where the file system has no flock: one run at a time, and none is kept out by a dead one."""

import errno
import fcntl
import os
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.outputs.provenance import file_hash
from pipeline.runtime import logs
from pipeline.storage import LocalStore, Ranges, file_locks
from pipeline.storage.local_copy import ReadThrough
from singer.errors import UserError


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=["NFS", "Lustre", "FUSE"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(file_locks, "SECONDS", 0.06)
    logs._once.clear()


def test_one_run_at_a_time(
    no_flock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder's file is renewed while the other run watches it."""
    store, times = LocalStore(tmp_path / "cache"), iter(range(10**9, 10**10))
    monkeypatch.setattr(file_locks, "SECONDS", 60.0)
    monkeypatch.setattr(file_locks.time, "sleep", lambda _: os.utime(tmp_path / ".cache.holder", (0, next(times))))
    for _ in range(2):
        with store.lock():
            with pytest.raises(UserError, match=f"cache is being written by another run .* process {os.getpid()}"):
                store.lock().__enter__()
            store.write("a", b"1")
        assert not list(tmp_path.glob(".*"))
    assert sum("has no flock" in record.message for record in caplog.records) == 1


def test_a_dead_run_of_this_machine_keeps_none_out(no_flock: None, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    (tmp_path / ".cache.holder").write_text(f"{socket.gethostname()} {ended.pid} abc")
    with LocalStore(tmp_path / "cache").lock():
        assert str(os.getpid()) in (tmp_path / ".cache.holder").read_text()
    assert not (tmp_path / ".cache.holder").exists()


@pytest.mark.parametrize("left", ["elsewhere 12 abc", ""])
def test_a_dead_run_of_another_machine_is_waited_for(left: str, no_flock: None, tmp_path: Path) -> None:
    (tmp_path / ".cache.holder").write_text(left)
    start = time.monotonic()
    with LocalStore(tmp_path / "cache").lock():
        assert time.monotonic() - start >= file_locks.SECONDS


def test_who_has_lost_the_lock_writes_no_more(no_flock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run that was stopped for minutes finds it."""
    store = LocalStore(tmp_path / "cache")
    with store.lock():
        (tmp_path / ".cache.holder").write_text("elsewhere 12 abc")
        file_locks.held[store.path]._renew()
        with pytest.raises(UserError, match="taken over by another run"):
            store.child("part").write("a", b"1")
        LocalStore(tmp_path / "other").write("a", b"1")
    assert (tmp_path / ".cache.holder").exists() and not file_locks.held


def test_copies_are_made_without_flock(no_flock: None, tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    source.write("a", b"abcdef")
    copies = ReadThrough(source, tmp_path / "copies", {"a": file_hash(source.path / "a")})
    out = np.empty(6, np.uint8)
    one = np.zeros(1, np.int64)
    copies.read_ranges(Ranges(["a"], one, one, one + 6, out, one))
    assert out.tobytes() == b"abcdef"
    assert [file.name for file in (tmp_path / "copies").iterdir()] == [file_hash(source.path / "a")]
