"""Open files: one bounded pool for the process, whose readers never meet a wrong byte or too many open files."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import run_singer, seeded, world_config
from forked import forked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_one_pass import write_shards

from pipeline.config import dump_config
from pipeline.data import ImageFile, index_images
from pipeline.storage import LocalStore, Opened, OpenFile, Ranges
from pipeline.storage.open_files import Pool
from singer.errors import UserError

ROOT = Path(__file__).parent.parent
LIMIT = 256


def open_below(folder: Path) -> int:
    """How many descriptors this process has of files below a folder."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        try:
            count += str(file.readlink()).startswith(f"{folder}/")
        except FileNotFoundError:  # the one that lists them
            continue
    return count


def read(*files: OpenFile) -> list[bytes]:
    with Opened(files) as numbers:
        return [os.pread(number, 100, 0) for number in numbers]


def numbered(folder: Path, count: int, most: int) -> tuple[Pool, list[OpenFile]]:
    """A pool, and files that hold their numbers."""
    pool = Pool(most)
    for n in range(count):
        (folder / f"{n}").write_text(f"{n}")
    return pool, [OpenFile(folder / f"{n}", pool) for n in range(count)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    most=st.integers(4, 12),
    plans=st.lists(
        st.lists(st.tuples(st.sampled_from(["read", "replace", "forget"]), st.integers(0, 14)), max_size=25),
        min_size=1,
        max_size=6,
    ),
)
def test_threads_share_the_pool(tmp_path: Path, most: int, plans: list[list[tuple[str, int]]]) -> None:
    """Every read gives the file's own bytes, of its version at the beginning or a later one; no more are ever open."""
    # One of its own: files of examples before this one may be open until the garbage collector runs.
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    versions, guard = dict.fromkeys(range(15), 0), threading.Lock()
    for n in versions:
        (folder / f"{n}").write_bytes(b"%d:0" % n)
    pool = Pool(most)
    files = {n: OpenFile(folder / f"{n}", pool) for n in versions}
    wrong: list[object] = []

    def run(plan: list[tuple[str, int]]) -> None:
        for action, n in plan:
            if action == "forget":
                files[n] = OpenFile(folder / f"{n}", pool)
            elif action == "replace":
                with guard:
                    version = versions[n] + 1
                    unfinished = tmp_path / f"new-{n}"
                    unfinished.write_bytes(b"%d:%d" % (n, version))
                    unfinished.replace(folder / f"{n}")
                    files[n] = OpenFile(folder / f"{n}", pool)
                    versions[n] = version
            else:
                wanted = sorted({(n + i) % 15 for i in range(pool.group)})
                before = [versions[m] for m in wanted]
                for m, least, data in zip(wanted, before, read(*(files[m] for m in wanted)), strict=True):
                    number, version = map(int, data.split(b":"))
                    if number != m or version < least:
                        wrong.append((m, least, data))
                if (count := open_below(folder)) > most:
                    wrong.append(count)

    with ThreadPoolExecutor(len(plans)) as threads:
        list(threads.map(run, plans))
    assert not wrong and open_below(folder) <= most
    files.clear()
    assert open_below(folder) == 0


def test_none_is_closed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs room waits until there is some."""
    pool, files = numbered(tmp_path, 4, 2)
    waits = threading.Event()
    wait = pool._released.wait

    def told() -> bool:
        waits.set()
        return wait()

    monkeypatch.setattr(pool._released, "wait", told)
    with ThreadPoolExecutor(1) as thread, Opened(files[:1]) as (first,):
        assert read(files[1]) == [b"1"] and read(files[2]) == [b"2"]
        with Opened(files[3:]):
            assert not waits.is_set()
            late = thread.submit(read, files[1])
            assert waits.wait(200) and open_below(tmp_path) == 2 and not late.done()
        assert late.result(200) == [b"1"] and os.pread(first, 1, 0) == b"0"
    del files
    assert open_below(tmp_path) == 0


def test_one_that_is_dropped_while_it_is_read_stays_open(tmp_path: Path) -> None:
    _, files = numbered(tmp_path, 1, 2)
    with Opened([files.pop()]) as (number,):
        assert os.pread(number, 1, 0) == b"0"
    assert open_below(tmp_path) == 0


def test_garbage_of_a_thread_that_holds_the_lock(tmp_path: Path) -> None:
    """It cannot wait for itself: the next use closes what was dropped."""
    pool, files = numbered(tmp_path, 2, 4)
    read(*files)
    with pool._lock:
        files.pop()
        assert open_below(tmp_path) == 2
    assert read(files[0]) == [b"0"] and open_below(tmp_path) == 1


def test_a_file_that_cannot_be_opened_leaves_no_trace(tmp_path: Path) -> None:
    file = OpenFile(tmp_path / "a", pool := Pool(1))
    for _ in range(3):
        with pytest.raises(FileNotFoundError) as caught:
            read(file)
        assert caught.value.filename == str(tmp_path / "a") and not pool.size and not pool.uses
    (tmp_path / "a").write_bytes(b"1")
    assert read(file) == [b"1"]


def test_others_may_have_taken_all_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then one that nobody uses is closed instead."""
    pool, files = numbered(tmp_path, 9, 100)
    really = os.open

    def limited(path: Path, flags: int) -> int:
        if open_below(tmp_path) >= 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return really(path, flags)

    monkeypatch.setattr(os, "open", limited)
    assert [read(file) for file in files] == [[b"%d" % n] for n in range(9)]
    with pytest.raises(OSError, match="Too many open files"):
        read(*files[:4])
    assert pool.size <= 3 and read(files[5]) == [b"5"]


def test_a_batch_of_more_files_than_the_pool_holds(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, Pool(8))
    names = [f"{n}" for n in range(30)]
    for n in names:
        store.write(n, f"{n:>4}".encode())
    which = np.random.default_rng(seeded(0)).permutation(60) % 30
    zeros, sizes = np.zeros(60, np.int64), np.full(60, 4)

    def right(_: int) -> bool:
        out = np.empty(240, np.uint8)
        store.read_ranges(Ranges(names, which, zeros, sizes, out, 4 * np.arange(60)))
        return bool(out.tobytes() == b"".join(b"%4d" % n for n in which) and open_below(tmp_path) <= 8)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(20)))


def test_a_child_reads_while_the_parents_threads_did(tmp_path: Path) -> None:
    """What other threads used at the time of fork(2) is free in the child, and no lock of theirs is held there."""
    code = f"""
import os, threading
from pathlib import Path
from pipeline.storage.open_files import Opened, OpenFile, Pool
pool = Pool(4)
os.register_at_fork(after_in_child=pool.after_fork)
files = [OpenFile(Path({str(tmp_path)!r}) / str(n), pool) for n in range(8)]
held, go = threading.Barrier(5), threading.Event()
def hold(n):
    with Opened([files[n]]):
        held.wait()
        go.wait()
threads = [threading.Thread(target=hold, args=(n,)) for n in range(4)]
for t in threads: t.start()
held.wait()
with pool._lock:
    child = os.fork()
if not child:
    for n, file in enumerate(files):
        with Opened([file]) as (number,):
            assert os.pread(number, 9, 0) == str(n).encode() and pool.size <= 4
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
go.set()
for t in threads: t.join()
"""
    for n in range(8):
        (tmp_path / f"{n}").write_text(f"{n}")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=200)


@pytest.mark.parametrize(("soft", "most"), [(256, 128), (1024, 512), (resource.RLIM_INFINITY, 8192), (1, 1)])
def test_the_users_limit_decides_and_stays(soft: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.delattr(resource, "setrlimit")
    assert Pool().most == most


def test_an_archive_that_changed_is_not_read(world: Path, tmp_path: Path) -> None:
    """Its images' places were those of another file."""
    shard = tmp_path / "a.tar"
    shutil.copy(sorted((world / "train").glob("*.tar"))[0], shard)
    with ImageFile(index_images(str(shard))) as files:
        first = files.encoded(0)
        assert files.encoded(0) == first
        other = tmp_path / "other"
        other.write_bytes(bytes(shard.stat().st_size))
        other.replace(shard)
        files.close()  # as when another file needs its place
        with pytest.raises(UserError, match=r"a\.tar: the shard has changed since this run began; start it again"):
            files.encoded(0)


def run_with_few_descriptors(*commands: tuple[object, ...], limit: int = LIMIT) -> None:
    """Commands of singer, one after the other in one process that may open `limit` files."""
    process = forked(run_all, limit, [tuple(map(str, command)) for command in commands], daemon=False)
    process.start()
    process.join()
    assert process.exitcode == 0


def run_all(limit: int, commands: list[tuple[str, ...]]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with pytest.MonkeyPatch.context() as patch:
        # Shards of the usual size would need many more records.
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 1)
        for command in commands:
            assert run_singer(patch, *command) == 0, command


def chain(world: Path, root: Path, *sets: str, shards: int = LIMIT + 4) -> list[tuple[object, ...]]:
    """From images to a student, with an appended block, over more archives and shards than may be open."""
    images = write_shards(root / "train", shards, 1)
    config = root / "config.yaml"
    config.write_text(dump_config(world_config(world, "distill.epochs=1", "refine.steps=2", "cache.workers=4", *sets)))
    common, cache, adapters, run = ("--config", config), root / "cache", root / "adapters", root / "run"
    make = "cache-teacher", *common, "--shards", images, "--out", cache
    return [
        make,
        (*make, "--append", "--set", "cache.blocks=[1]"),
        ("refine", *common, "--cache", cache, "--out", adapters),
        ("distill", *common, "--cache", cache, "--refiner", adapters, "--out", run),
        ("cache", "verify", cache),
        ("inspect", cache, *common, "--refiner", adapters, "--shards", images),
        ("evaluate", run, *common, "--train", images, "--test", images),
    ]


@pytest.mark.slow
def test_the_chain_with_few_descriptors(world: Path, tmp_path: Path) -> None:
    commands = chain(world, tmp_path, "cache.blocks=[3]", "cache.codec=float16")
    run_with_few_descriptors(*commands[:5])
    assert sum("/c/" in str(f) for f in (tmp_path / "cache").rglob("*") if f.is_file()) > 2 * LIMIT


@pytest.mark.slow
def test_all_commands_with_few_descriptors(world: Path, tmp_path: Path) -> None:
    run_with_few_descriptors(*chain(world, tmp_path))


@pytest.mark.slow
def test_80_shards_with_70_descriptors(world: Path, tmp_path: Path) -> None:
    """From tars, resumed, verified, and with pixels that are not stored."""
    make, append, *others = chain(world, tmp_path, "views.pixels=none", shards=80)
    run_with_few_descriptors(make, (*make, "--resume"), append, *others, limit=70)
