"""Local copies of objects: made once, never of wrong bytes, and within a limit, by how long they were unused."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import seeded
from stores import file_limit, kill_while_writing, ranges

from pipeline.cache.reader import Cache
from pipeline.config import LocalCopy, load_config
from pipeline.storage import CopyRoom, LocalStore, Ranges, ReadThrough, local_copy, open_store
from singer.errors import UserError

SIZE = 100
SEGMENT = "0123456789abcdef"


class Source(LocalStore):
    """Counts what is read whole, and how often ranges are read. seconds: what reading an object takes."""

    whole, parts, seconds = 0, 0, 0.0

    def read(self, name: str) -> bytes:
        self.whole += 1
        time.sleep(self.seconds)
        return super().read(name)

    def read_ranges(self, ranges: Ranges) -> None:
        self.parts += 1
        super().read_ranges(ranges)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    source = Source(tmp_path / "source")
    random = np.random.default_rng(seeded(0))
    for name in "abcd":
        source.write(name, random.bytes(SIZE))
    return source


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(source: Source, name: str) -> bytes:
    return (source.path / name).read_bytes()


def reader(source: Source, folder: Path, most: int) -> ReadThrough:
    sums = {name: digest(source, name) for name in "abcd"}
    return ReadThrough(source, folder / SEGMENT, sums, CopyRoom(folder, most), dict.fromkeys("abcd", SIZE))


def digest(source: Source, name: str) -> str:
    return sha256(content(source, name))


def read(reader: ReadThrough, names: Sequence[str]) -> list[bytes]:
    """Read the second half of each object."""
    out, count = np.zeros(len(names) * SIZE // 2, np.uint8), np.arange(len(names))
    half = np.full(len(names), SIZE // 2)
    reader.read_ranges(Ranges(names, count, half, half, out, count * (SIZE // 2)))
    return [piece.tobytes() for piece in np.split(out, len(names))]


def copies(source: Source, folder: Path) -> str:
    held = {path.name for path in (folder / SEGMENT).iterdir()}
    assert held <= {digest(source, name) for name in "abcd"}
    return "".join(name for name in "abcd" if digest(source, name) in held)


def age(source: Source, folder: Path, name: str, seconds: float) -> None:
    """Let a copy look as if it had been used so long ago."""
    os.utime(folder / SEGMENT / digest(source, name), (time.time() - seconds,) * 2)


def test_what_was_unused_for_longest_is_removed(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    (folder / SEGMENT).mkdir(parents=True)
    blob = folder / "blobs" / hashlib.sha256(b"of another program").hexdigest()
    blob.parent.mkdir()
    for other in (folder / "notes.txt", folder / SEGMENT / "notes.txt", blob):
        other.write_bytes(b"x" * 1000)  # not a copy: it neither counts nor goes
        os.utime(other, (0, 0))
    (folder / SEGMENT / "notes.txt").rename(folder / "notes-2.txt")
    one = reader(source, folder, 250)
    assert read(one, "ab") == [content(source, name)[50:] for name in "ab"]
    age(source, folder, "a", 5000)
    age(source, folder, "b", 9000)
    assert read(one, "c") == [content(source, "c")[50:]] and copies(source, folder) == "ac"
    # What is read has a new time, and the next one to go is another.
    assert read(reader(source, folder, 250), "a") == [content(source, "a")[50:]]
    age(source, folder, "c", 5000)
    assert read(one, "b") == [content(source, "b")[50:]] and copies(source, folder) == "ab"
    assert source.whole == 4 and source.parts == 0
    assert (folder / "notes.txt").exists() and (folder / "notes-2.txt").exists() and blob.exists()


def test_what_is_in_use_stays_and_the_rest_is_read_from_its_source(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "copy"
    one = reader(source, folder, 250)
    for _ in range(3):
        assert read(one, "dacb") == [content(source, name)[50:] for name in "dacb"]
    assert len(copies(source, folder)) == 2 and source.whole == 2 and source.parts == 3
    assert "the 2.5e-07 GB of local copies" in caplog.text and caplog.text.count("are in use") == 1
    # A copy that another process removes is read from the source, at once and later.
    (folder / SEGMENT / digest(source, "a")).unlink()
    assert read(one, "a") == [content(source, "a")[50:]]
    assert read(one, "a") == [content(source, "a")[50:]] and source.whole == 2


def test_a_limit_below_one_object_is_told(source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Smaller objects are copied nevertheless."""
    folder, sums = tmp_path / "copy", {name: digest(source, name) for name in "ab"}
    one = ReadThrough(source, folder / SEGMENT, sums, CopyRoom(folder, 150), {"a": 200, "b": SIZE})
    for _ in range(2):
        assert read(one, "ab") == [content(source, name)[50:] for name in "ab"]
    assert copies(source, folder) == "b" and source.whole == 1 and source.parts == 2
    assert caplog.text.count("takes more than the 1.5e-07 GB of local_copy_gb") == 1
    assert "set local_copy_gb to 0.001 or more" in caplog.text and "are in use" not in caplog.text


def test_a_full_disk_has_no_room(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"

    def full(file: int, path: Path, *_: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(local_copy, "write_durably", full)
    one = reader(source, folder, 10 * SIZE)
    assert read(one, "ab") == [content(source, name)[50:] for name in "ab"]
    assert source.whole == 1 and source.parts == 1 and not copies(source, folder)
    assert caplog.text.count("do not fit the disk, which is full") == 1


def test_a_removed_copy_is_closed(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are not free while it is open."""
    folder = tmp_path / "copy"
    one = reader(source, folder, 250)
    read(one, "a")
    copy = folder / SEGMENT / digest(source, "a")
    assert str(copy) in opened()
    copy.unlink()
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + local_copy.IN_USE_SECONDS)  # a while later
    read(one, "b")
    assert not [name for name in opened() if copy.name in name]


def opened() -> list[str]:
    found = []
    for number in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(number.readlink()))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def test_many_readers_stay_below_the_limit(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with locks of its own, as in processes; copies are removed all the time, also between look and read."""
    monkeypatch.setattr(local_copy, "IN_USE_SECONDS", 0.0)
    folder, most, wrong, end = tmp_path / "copy", [0], [], threading.Event()

    def work(number: int) -> None:
        one, random = reader(source, folder, 250), np.random.default_rng(seeded(number))
        for _ in range(10):
            names = random.permutation(list("abcd"))[:2].tolist()
            if read(one, names) != [content(source, name)[50:] for name in names]:
                wrong.append(names)

    def watch() -> None:
        while not end.wait(0.005):
            with (folder / ".room.lock").open("a") as lock:  # between two steps of the others
                local_copy.flock(lock.fileno(), folder, wait=True)
                # A copy that is renamed meanwhile may be listed twice.
                sizes = {}
                for path in (folder / SEGMENT).glob("*"):
                    with suppress(FileNotFoundError):
                        sizes[path.stat().st_ino] = path.stat().st_size
                most.append(sum(sizes.values()))

    (folder / SEGMENT).mkdir(parents=True)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    end.set()
    watcher.join()
    assert not wrong and 100 <= max(most) <= 250 and source.whole > 4


def test_a_cache_is_read_through_limited_copies(world: Path, tmp_path: Path) -> None:
    cache = world / "cache"
    records = np.arange(len(Cache(cache)))[::3]
    expected = Cache(cache).read(records)
    half = sum(size for name, size in open_store(cache).sizes().items() if "/c/" in name) // 2
    found = Cache(cache, local_copy=LocalCopy(tmp_path, half / 1e9)).read(records)
    for block, parts in expected.blocks.items():
        for part, values in parts.items():
            assert bytes(np.asarray(values)) == bytes(np.asarray(found.blocks[block][part]))
    assert 0 < sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= half


def test_a_limit_needs_a_folder() -> None:
    for section in ("refine", "distill"):
        with pytest.raises(UserError, match=f"{section}.local_copy_gb: there is no folder that it limits"):
            load_config(None, [f"{section}.local_copy_gb=5"])
        config = load_config(None, [f"{section}.local_copy_gb=5", f"{section}.local_copy=there"])
        assert getattr(config, section).local_copies == LocalCopy(Path("there"), 5)


def test_copies_are_made_once(source: Source, tmp_path: Path) -> None:
    """By whichever thread or process comes first: a lock on a file tells neither from the other."""
    source.write("a", b"content")
    source.seconds, sums = 0.1, {"a": sha256(b"content")}
    shared = ReadThrough(source, tmp_path / "copy", sums)
    readers = [shared, shared, *(ReadThrough(source, tmp_path / "copy", sums) for _ in range(3))]
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda r=r: found.extend(ranges(r, "a", [3], [4]))) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"tent"] * 5 and source.whole == 1
    assert [f.read_bytes() for f in (tmp_path / "copy").iterdir()] == [b"content"]
    assert shared.url == source.url


def test_a_copy_of_what_was_replaced_is_not_used(source: Source, tmp_path: Path) -> None:
    for content in (b"content", b"another"):
        source.write("a", content)
        reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(content)})
        assert ranges(reader, "a", [0], [7]) == [content]


def test_wrong_bytes_are_not_kept(source: Source, tmp_path: Path) -> None:
    reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(b"content")})
    source.write("a", b"cOntent")
    for _ in range(2):
        with pytest.raises(UserError, match="/a does not match its checksum; run singer cache verify"):
            ranges(reader, "a", [0], [1])
        assert not list((tmp_path / "copy").iterdir())
    source.write("a", b"content")
    assert ranges(reader, "a", [0], [7]) == [b"content"]


def test_killed_copy_does_not_count(source: Source, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    source.write("a", b"much more content")
    kill_while_writing(
        f"source, copy = LocalStore(Path({str(source.path)!r})), Path({str(copy)!r})\n"
        f"checksums = {{'a': {sha256(b'much more content')!r}}}\n"
        "import numpy as np\nzero, out = np.zeros(1, int), np.empty(1, np.uint8)\n"
        "ReadThrough(source, copy, checksums).read_ranges(Ranges(['a'], zero, zero, zero + 1, out, zero))"
    )
    (rest,) = copy.iterdir()
    assert rest.name.endswith(".singer-tmp") and rest.read_bytes() == b"much more content"
    rest.write_bytes(b"torn " * 9)
    reader = ReadThrough(source, copy, {"a": sha256(b"much more content")})
    assert ranges(reader, "a", [0], [17]) == [b"much more content"] and source.whole == 1
    assert [f.read_bytes() for f in copy.iterdir()] == [b"much more content"]


def test_full_disk_of_copies(source: Source, tmp_path: Path) -> None:
    data = b"x" * 5000
    source.write("a", data)
    reader = ReadThrough(source, tmp_path / "copy", {"a": sha256(data)})
    with file_limit(1000), pytest.raises(OSError) as caught:
        ranges(reader, "a", [0], [1])
    assert caught.value.filename == str(tmp_path / "copy" / sha256(data))
    assert not list((tmp_path / "copy").iterdir())
    assert ranges(reader, "a", [4999], [1]) == [b"x"]
