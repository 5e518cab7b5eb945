"""Stores: one contract for folders and object stores."""

import threading
from pathlib import Path

import obstore
import pytest
from stores import ranges, raw

from pipeline.storage import Store, open_store
from singer.errors import UserError


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path, url: str) -> Path | str:
    return tmp_path / "store" if request.param == "local" else url


@pytest.fixture
def store(place: Path | str) -> Store:
    return open_store(place)


def test_objects_are_read_as_written(store: Store, place: Path | str) -> None:
    store.write("a/b", b"one ", memoryview(b"two"), b"")
    store.write("empty")
    assert store.read("a/b") == open_store(place).read("a/b") == b"one two"
    assert store.read("empty") == b""
    store.write("a/b", b"shorter")
    assert store.read("a/b") == b"shorter"
    for missing in ("a", "c", "empty/c"):
        with pytest.raises(FileNotFoundError):
            store.read(missing)


def test_ranges(store: Store) -> None:
    store.write("ten", b"0123456789")
    assert ranges(store, "ten", [8, 0, 3, 8, 5], [2, 3, 0, 1, 5]) == [b"89", b"012", b"", b"8", b"56789"]
    assert ranges(store, "ten", [], []) == []
    for offset in (8, 20):
        with pytest.raises(UserError, match="/ten ends too early; run singer cache verify"):
            ranges(store, "ten", [0, offset], [1, 3])
    for name in ("nine", "ten/nine"):
        with pytest.raises(UserError, match=f"/{name} is missing; run singer cache verify"):
            ranges(store, name, [0], [1])


def test_ranges_of_what_was_replaced(store: Store) -> None:
    """Shards are written anew by --repair and --resume while a store is in use."""
    for content in (b"old", b"new", b"newer"):
        store.write("a", content)
        assert ranges(store, "a", [0], [len(content)]) == [content]
    store.remove("a")
    with pytest.raises(UserError, match="is missing"):
        ranges(store, "a", [0], [1])


def test_sizes_are_of_the_folder(store: Store, place: Path | str) -> None:
    names = ["journal/1", "journal/2/x", "journal2/1", "journal", "with space", "ü", "a%20b", "a+b"]
    if isinstance(place, Path):
        names.remove("journal")  # no file can be where a folder is
    for i, name in enumerate(names):
        store.write(name, b"x" * i)
    open_store(f"{place}2").write("sibling", b"x")
    everything = dict(zip(names, range(len(names)), strict=True))
    assert store.sizes() == everything
    assert store.sizes("journal") == {n: s for n, s in everything.items() if n.startswith("journal/")}
    assert store.sizes("journal/2") == {"journal/2/x": 1}
    assert store.sizes("nothing") == store.sizes("with space") == {}
    for name in names:
        assert len(store.read(name)) == everything[name]


def test_child(store: Store, place: Path | str) -> None:
    store.write("x", b"outer")
    child = store.child("parts/001")
    child.write("x", b"inner")
    child.child("deep").write("y", b"1")
    assert child.url == f"{place}/parts/001" and child.read("x") == b"inner"
    assert child.sizes() == {"x": 5, "deep/y": 1} and child.sizes("deep") == {"deep/y": 1}
    assert ranges(child, "x", [1], [2]) == [b"nn"]
    assert store.sizes() == {"x": 5, "parts/001/x": 5, "parts/001/deep/y": 1}
    child.remove("x")
    child.remove("x")
    assert set(store.sizes("parts")) == {"parts/001/deep/y"}
    child.clear()
    assert store.sizes() == {"x": 5}


def test_clear(store: Store, place: Path | str) -> None:
    store.clear()
    for name in ("a", "b/c", "z"):
        store.write(name, b"1")
    assert ranges(store, "z", [0], [1]) == [b"1"]
    open_store(f"{place}2").write("sibling", b"x")
    with store.lock():
        store.clear(last="b/c")
        with pytest.raises(UserError, match="being written"), open_store(place).lock():
            pass
    assert store.sizes() == {}
    with pytest.raises(UserError, match="is missing"):
        ranges(store, "z", [0], [1])
    assert open_store(f"{place}2").sizes() == {"sibling": 1}


def test_one_writer(store: Store, place: Path | str) -> None:
    with store.lock():
        for again in (store, open_store(place)):
            with pytest.raises(UserError, match="is being written by another run"), again.lock():
                pass
        store.write("a", b"1")
        assert store.sizes() == {"a": 1}
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), open_store(place).lock():
            raise error
    with store.lock():
        pass
    assert store.sizes() == {"a": 1}
    if isinstance(place, Path):
        assert not list(place.parent.glob(".*"))
    else:
        assert [e["path"] for e in obstore.list(raw(place)).collect()] == ["a"]


def test_threads_share_a_store(store: Store) -> None:
    """Each object changes from one content to another; readers see either, whole."""
    old, new = b"o" * 5000, b"n" * 5000
    store.write("a", old)
    seen: set[bytes] = set()

    def read() -> None:
        for _ in range(15):
            seen.update({store.read("a"), *ranges(store, "a", [0], [5000])})

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    store.write("a", new)
    for thread in threads:
        thread.join()
    assert seen <= {old, new} and store.read("a") == new == ranges(store, "a", [0], [5000])[0]
