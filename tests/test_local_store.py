"""Folders as stores: all or nothing, whatever kind of folder it is, and ranges of files with few reads."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import file_limit, kill_while_writing, ranges

from pipeline.storage import LocalStore, Ranges, joined_reads, whole_file
from pipeline.training.run_log import RunLog
from singer.errors import UserError


def test_files_stay_open_only_as_long_as_needed(tmp_path: Path) -> None:
    def count() -> int:
        return sum(str(tmp_path) in str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())

    store = LocalStore(tmp_path)
    for i in range(5):
        store.write(f"{i}", b"1")
        ranges(store, f"{i}", [0], [1])
    assert count() == 5
    store.write("0", b"2")
    store.remove("1")
    assert count() == 3
    del store
    assert count() == 0


def test_killed_write_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "store"
    LocalStore(out).write("a/b", b"old")
    kill_while_writing(f"LocalStore(Path({str(out)!r})).write('a/b', b'new content')")
    (rest,) = (f for f in out.rglob("*") if f.is_file() and f.name != "b")
    assert rest.read_bytes() == b"new content"
    store = LocalStore(out)
    assert store.sizes() == {"a/b": 3} and store.read("a/b") == b"old"
    with store.lock():
        assert not rest.exists()
    assert store.sizes() == {"a/b": 3}


def test_killed_removal_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    store.write("a/b", b"1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: None)
        store.clear()
    assert store.sizes() == {} and list(tmp_path.iterdir())
    with store.lock():
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    for content in (b"one", b"two"):
        store = LocalStore(tmp_path / "run")
        with store.lock():
            store.clear()
            store.write("file", content)
        assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run" / "file").read_bytes() == content
    # The folder has one lock, by whichever name.
    with (
        LocalStore(tmp_path / "run").lock(),
        pytest.raises(UserError, match="is being written by another run"),
        LocalStore(tmp_path / "disk" / "run").lock(),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "run"] and len([*(tmp_path / "disk").iterdir()]) == 1
    # A kill in mid-removal leaves a link to nothing.
    (tmp_path / "disk" / "run").rename(tmp_path / "disk" / ".run.removed")
    with LocalStore(tmp_path / "run").lock():
        LocalStore(tmp_path / "run").write("file", b"three")
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["run"] and (tmp_path / "run").is_symlink()


def test_a_mount_point_is_emptied_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system renames no mount point; a removal that is interrupted leaves the file that says whose folder it is."""
    store, removed = LocalStore(tmp_path / "mount"), []
    for name in ("a", "provenance.json", "shards/b", "z"):
        store.write(name, b"content")
    (tmp_path / "mount" / "link").symlink_to(tmp_path)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

    def unlink(self: Path) -> None:
        removed.append(self.name)
        os.unlink(self)  # noqa: PTH108

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "unlink", unlink)
    store.clear(last="provenance.json")
    assert (tmp_path / "mount").is_dir() and store.sizes() == {}
    assert removed[-1] == "provenance.json" and sorted(removed) == ["a", "link", "provenance.json", "z"]


@pytest.mark.parametrize("there", [True, False], ids=["a volume", "no folder"])
def test_a_folder_whose_parent_is_closed(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open

    def refuse(self: Path, *args: Any) -> Any:
        if self == tmp_path / ".out.lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return open_file(self, *args)

    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="cannot be written to") as caught, LocalStore(tmp_path / "out").lock():
        pass
    if there:
        assert str(caught.value).endswith(f"give a folder inside it, such as {tmp_path / 'out' / 'run'}")
        with LocalStore(tmp_path / "out" / "run").lock():  # the remedy works
            LocalStore(tmp_path / "out" / "run").write("file", b"content")


def test_the_current_folder_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is beside it, not in it, where it would look like an output."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with LocalStore(Path()).lock():
        assert LocalStore(Path()).sizes() == {} and [p.name for p in tmp_path.iterdir() if p.is_file()] == [".run.lock"]


def test_full_disk_names_the_file(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"old")
    with file_limit(1000), pytest.raises(OSError) as caught:
        store.write("a", b"x" * 900, b"y" * 900)
    assert caught.value.filename == str(tmp_path / "a") and caught.value.strerror == "File too large"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and store.read("a") == b"old"


def test_full_disk_names_the_file_of_others(tmp_path: Path) -> None:
    """What a library or a plain file object writes names no file."""
    log = RunLog(tmp_path / "log.jsonl", 0, True)
    log._path = full = Path("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        log.write(step=1)
    assert caught.value.filename == str(full)
    with pytest.raises(OSError, match="No space") as caught, whole_file(tmp_path / "a"), full.open("w") as file:
        file.write("a")
        file.flush()
    assert caught.value.filename == str(tmp_path / "a")


class Uneven:
    """Reads as a system gives them that is interrupted: only some of the bytes, or an error for several places."""

    def __init__(self, seed: int) -> None:
        self._read, self._random = os.preadv, np.random.default_rng(seeded(seed))

    def __call__(self, file: int, places: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if self._random.random() < 0.5:
            return self._read(file, places, offset, flags)
        if len(places) > 1 and self._random.random() < 0.5:
            raise OSError(errno.EIO, "io")
        return self._read(file, [places[0][: 1 + int(self._random.integers(len(places[0]) or 1))]], offset, flags)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.tuples(st.sampled_from([0, 0, 1, 8, 100]), st.integers(2, 40), st.integers(0, 2)), max_size=60),
    most=st.integers(1, 9),
    through=st.sampled_from([0, 8, 50]),
    seed=st.integers(0, 9),
)
def test_ranges_come_to_their_places(
    tmp_path: Path, gaps: list[tuple[int, int, int]], most: int, through: int, seed: int
) -> None:
    """Whatever is between them, in whichever files and order, and however much of them one read brings."""
    data = [bytes(np.random.default_rng(seeded(n)).integers(0, 256, 10_000, dtype=np.uint8)) for n in range(3)]
    for n in range(3):
        (tmp_path / f"{n}").write_bytes(data[n])
    ends = np.cumsum([gap + length for gap, length, _ in gaps], dtype=np.int64)
    lengths, files = (np.array([g[i] for g in gaps], np.int64) for i in (1, 2))
    order = np.random.default_rng(seeded(seed)).permutation(len(gaps)) if seed else np.arange(len(gaps))
    which, offsets, lengths = files[order], (ends - lengths)[order], lengths[order]
    places = np.cumsum(lengths) - lengths
    if seed % 2:
        places = lengths.sum() - lengths - places  # the last one first
    wanted = np.zeros(lengths.sum(), np.uint8)
    for file, offset, length, place in zip(which, offsets, lengths, places, strict=True):
        wanted[place : place + length] = np.frombuffer(data[file][offset : offset + length], np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_reads, "_PIECES", most)
        patch.setattr(joined_reads, "_NOTHING", memoryview(bytearray(through)))
        for read in (os.preadv, Uneven(seed)):
            patch.setattr(os, "preadv", read)
            out = np.zeros_like(wanted)
            LocalStore(tmp_path).read_ranges(Ranges(["0", "1", "2"], which, offsets, lengths, out, places))
            assert np.array_equal(out, wanted)


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of records, whatever their order in memory: of numbers without gaps, and of byte strings with headers."""
    store, content, calls = LocalStore(tmp_path), np.random.default_rng(seeded(0)).bytes(1 << 16), list[int]()
    store.write("a", content)
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *of: calls.append(len(of[1])) or read(*of))
    for gap, pieces in ((0, 64), (8, 127)):
        offsets, places = np.arange(64) * (100 + gap), np.random.default_rng(seeded(1)).permutation(64) * 100
        lengths, out = np.full(64, 100), np.zeros(6400, np.uint8)
        store.read_ranges(Ranges(["a"], np.zeros(64, np.int64), offsets, lengths, out, places))
        for offset, place in zip(offsets.tolist(), places.tolist(), strict=True):
            assert out[place : place + 100].tobytes() == content[offset : offset + 100]
        assert calls == [pieces]
        calls.clear()


@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_in_memory_is_asked_for_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Whether or not Python can ask for what is in memory alone."""
    store, content = LocalStore(tmp_path), np.random.default_rng(seeded(0)).bytes(1 << 22)
    store.write("a", content)
    file = os.open(tmp_path / "a", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    if not known:
        monkeypatch.setattr(joined_reads, "_NOWAIT", 0)
    offsets = list(range(0, 1 << 22, 40_000))[::-1]
    assert ranges(store, "a", offsets, [4000] * len(offsets)) == [content[o : o + 4000] for o in offsets]


def test_ranges_in_threads_and_children(tmp_path: Path) -> None:
    """They share open files, and no read moves the place of another one."""
    store = LocalStore(tmp_path)
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [1], [2]) == [b"12"]
    child = os.fork()
    if not child:
        os._exit(ranges(store, "ten", [3], [2]) != [b"34"])
    assert os.waitpid(child, 0)[1] == 0
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: ranges(store, "ten", [n % 10], [1]), range(200)))
    assert found == [[b"%d" % (n % 10)] for n in range(200)]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for count in (1, 2):
        with pytest.raises(OSError) as caught:
            ranges(LocalStore(tmp_path), "folder", list(range(count)), [1] * count)
        assert caught.value.filename == str(tmp_path / "folder")


def test_a_file_that_ends_within_joined_ranges_is_named(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [8, 0, 3], [2, 3, 0]) == [b"89", b"012", b""]
    for offsets, lengths in (([0, 8], [1, 3]), ([8, 10], [2, 1]), ([4, 8, 12], [4, 4, 4])):
        with pytest.raises(UserError, match="/ten ends too early; run singer cache verify"):
            ranges(store, "ten", offsets, lengths)
