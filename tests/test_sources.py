"""Sources of images: what names them, their classes, several in one cache, and those that moved."""

import os
from pathlib import Path

import pytest
from sources import content, encoded, photos, table, write
from tars import png, write_tar

from pipeline.cache.index import image_bytes, read_images
from pipeline.config import load_config
from pipeline.data import (
    ImageFile,
    check_class_numbers,
    index_beside,
    index_images,
    list_probe_images,
    numbered_as,
    relocate,
    resolve,
)
from pipeline.data.images import read_classes
from pipeline.data.specs import braces
from pipeline.storage import LocalStore
from singer.errors import UserError

pytest.importorskip("pyarrow")


def names(spec: str | list[str]) -> list[str]:
    return [path.name for path in resolve(spec)]


def test_braces_are_those_of_shells() -> None:
    for text, expected in {
        "a": ["a"],
        "a{1..3}b": ["a1b", "a2b", "a3b"],
        "{08..10}": ["08", "09", "10"],
        "{3..1}": ["3", "2", "1"],
        "{0..6..3}": ["0", "3", "6"],
        "{a,b}{1..2}": ["a1", "a2", "b1", "b2"],
        "{a}{}x{1..y}": ["{a}{}x{1..y}"],
        "{a..c}{B..A}": ["aB", "aA", "bB", "bA", "cB", "cA"],
        "{a..C}": ["{a..C}"],
        "{a,b/c}.tar": ["a.tar", "b/c.tar"],
    }.items():
        assert list(braces(text)) == expected
    with pytest.raises(UserError, match="more than 1000000 files"):
        list(braces("{0..99999999}"))
    assert list(braces("{a{b,c}}")) == ["{ab}", "{ac}"]
    for nested in ("a{b,{c,d}}.tar", "{{a,b},c}", "x{a{1..2}b{3..4},c}", "{a{b{c,d},e}}"):
        with pytest.raises(UserError, match=r"has choices in braces within others, .*; give several patterns"):
            list(braces(nested))


def test_a_name_that_exists_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("d[1]/x{1,2}.tar", "d[1]/y*.tar", "d1/z.tar", "a b/s.tar"):
        write_tar(write(tmp_path / name, b""), {"a.png": png()})
    monkeypatch.chdir(tmp_path)
    assert names("d[1]/x{1,2}.tar") == ["x{1,2}.tar"] and names("d[1]/*.tar") == ["x{1,2}.tar", "y*.tar"]
    assert names("d[1]") == ["x{1,2}.tar", "y*.tar"] and names("d?/*.tar") == ["z.tar"]
    assert (
        names(str(tmp_path / "{a b,d1}/*.tar")) == ["s.tar", "z.tar"] == names(["a b", f"file://{tmp_path}/d1/z.tar"])
    )
    monkeypatch.setenv("HOME", str(tmp_path / "d1"))
    assert names("~/z.tar") == ["z.tar"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing/*.tar", r"nothing matches 'nothing/\*\.tar'; quote it"),
        ("nothing.tar", r"^nothing\.tar does not exist$"),
        ("s-{0..1}.tar", r"^'s-\{0\.\.1\}\.tar': s-0\.tar does not exist \(nor 1 more\)"),
        ("pipe:cat x.tar", "'pipe:cat x.tar': a pipe can be read once"),
        ("ftp://host/x.tar", "is of no known kind"),
        ("https://host/*.tar", "a web server has no list of its files; give a brace range"),
        ("~nobody-here/x.tar", "no such user"),
        ("cat.png", "cat.png is an image; give its folder, or a list"),
        ("empty", r"no images \(.*\) below empty"),
        ("both", r"'both' holds shards and tables; give one: 'both/\*\.tar'"),
        ("splits", r"'splits' has the splits test, train; give one: 'splits/test-\*'"),
        ("arrow", r"'arrow' has the splits test, train; give one: arrow/test"),
        ("  ", "a name is empty, as of a variable of the shell that is not set"),
        ("a.tar::b.tar", "'a.tar::b.tar' names several; give each one by itself"),
        ("s-{a..b}.tar", r"^'s-\{a\.\.b\}\.tar': s-a\.tar does not exist \(nor 1 more\)"),
        ("deep", r"'deep' holds no images, .* such as s/a\.tar; .* or all: 'deep/\*\*/\*\.tar'"),
        ("mixed", r"'mixed' holds shards, such as a\.tar, and images, such as cat/b\.png; .* 'mixed/\*\.tar'"),
        ("x.zip", "x.zip is no folder, shard, list or table: unpack it, and give the folder"),
        ("x.json", "one JSON object a line in a file .jsonl is read"),
    ],
)
def test_what_is_wrong_is_quoted(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cat.png", png())
    (tmp_path / "empty").mkdir()
    for name in ("deep/s/a.tar", "mixed/a.tar", "mixed/cat/b.png", "x.zip", "x.json"):
        write(tmp_path / name, b"")
    for name in ("both/a.tar", "both/a.parquet", "splits/train-00000-of-00002.parquet", "arrow/train/data.arrow"):
        write(tmp_path / name, b"")
    for name in ("splits/test-00000-of-00001-0123456789abcdef.parquet", "arrow/test/data.arrow"):
        write(tmp_path / name, b"")
    write(tmp_path / "arrow" / "dataset_dict.json", "{}")
    with pytest.raises(UserError, match=message) as error:
        index_images(given)
    assert "\n" not in str(error.value)


def test_an_unpacked_shard_stands_for_the_compressed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tar.gz", "a.tar", "b.tgz", "b.tar", "c.tar.xz", "d.tlz", "d.tar", "e.tar.lz4", "notes.gz"):
        write(tmp_path / name, b"")
    monkeypatch.chdir(tmp_path)
    assert names(str(tmp_path)) == ["a.tar", "b.tar", "c.tar.xz", "d.tar", "e.tar.lz4"]


def test_twice_is_seen_through_links(tmp_path: Path) -> None:
    photos(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match="in is given twice"):
        resolve([str(tmp_path / "in"), str(tmp_path / "link")])


def test_several_sources_in_one_cache(tmp_path: Path) -> None:
    """All kinds at once, stored and read again."""
    photos(tmp_path / "a")
    photos(tmp_path / "b", "cat/a.png emu/d.png")
    write(tmp_path / "c" / "classes.json", '["emu", "cat"]')
    write_tar(tmp_path / "c" / "s.tar", {"x.png": encoded(7), "x.cls": b"1"})
    table(tmp_path / "t.parquet", {"image": [encoded(8)]})
    images = index_images([str(tmp_path / name) for name in ("a", "c/s.tar", "t.parquet", "b")])
    assert images.classes == ("cat", "dog", "emu")
    labels = {key: label for key, (label, _) in content(images).items()}
    assert labels == {"cat/a": 0, "cat/b": 0, "dog/c": 1, "x": 0, "t/000000": -1, "b/cat/a": 0, "emu/d": 2}
    store = LocalStore(tmp_path / "store")
    store.write("images.safetensors", image_bytes(images))
    again = read_images(store)
    assert content(again) == content(images) and again.classes == images.classes
    alone = index_images(str(tmp_path / "c" / "s.tar"))
    assert b"file_end" not in image_bytes(alone) and alone.classes == ("emu", "cat")
    (tmp_path / "c" / "classes.json").unlink()
    with pytest.raises(
        UserError, match=r"s\.tar has class 1, and no names of classes, which another source has; .*classes\.json"
    ):
        index_images([str(tmp_path / "a"), str(tmp_path / "c" / "s.tar")])


def test_shards_of_several_folders_have_the_classes_of_all(tmp_path: Path) -> None:
    """Their numbers are those of each folder's classes.json; a test set gets those of its training set."""
    for folder, names in (("a", '["cat", "dog"]'), ("b", '["aeroplane", "boat"]')):
        write(tmp_path / folder / "classes.json", names)
        write_tar(tmp_path / folder / "s.tar", {f"{folder}0.png": encoded(1), f"{folder}0.cls": b"0",
                                                f"{folder}1.png": encoded(2), f"{folder}1.cls": b"1"})  # fmt: skip
    both = index_images([str(tmp_path / folder / "s.tar") for folder in "ab"])
    assert both.classes == ("aeroplane", "boat", "cat", "dog")
    assert dict(zip(both.keys, both.labels.tolist(), strict=True)) == {"a0": 2, "a1": 3, "b0": 0, "b1": 1}
    photos(tmp_path / "train", "aardvark/a.png boat/b.png cat/c.png")
    train, test = list_probe_images(load_config(), str(tmp_path / "train"), str(tmp_path / "b" / "s.tar"))
    assert [train.classes.index("boat")] == test.labels.tolist()[1:]
    assert test.classes[test.labels[0]] == "aeroplane"


def test_classes_are_numbered_as_others(tmp_path: Path) -> None:
    images = index_images(str(photos(tmp_path / "a", "dog/a.png ant/b.png")))
    again = numbered_as(images, ["cat", "dog"])
    assert again.classes == ("cat", "dog", "ant")
    assert dict(zip(again.keys, again.labels.tolist(), strict=True)) == {"dog/a": 1, "ant/b": 2}


def test_shards_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """Small tars have equal sizes, so that only their number tells that one is missing."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", {f"{folder}.png": png()})
    both = [str(tmp_path / folder / "x.tar") for folder in ("a", "b")]
    images = index_images(both)
    assert relocate(images, both).paths == images.paths
    with pytest.raises(UserError, match="--images gives 1 sources; the cache has 2, some of one name"):
        relocate(images, both[0])


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('{"dog": 1, "cat": 0}', ["cat", "dog"]),
        ('{"dog": 1, "cat": 2}', None),
        ('{"0": ["n01", "tench"]}', None),
        ('[["a"], "b"]', None),
        ('"ab"', None),
    ],
)
def test_names_of_classes(text: str, classes: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(text)
    if classes is None:
        with pytest.raises(UserError, match="holds no list of classes"):
            read_classes(tmp_path / "classes.json")
    else:
        assert read_classes(tmp_path / "classes.json") == classes


def test_a_date_is_no_class_number(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"0", "b.png": png(), "b.cls": b"20190101"})
    images = index_images(str(tmp_path / "x.tar"))
    with pytest.raises(
        UserError, match="--train: label 20190101 of 'b' is no class number of 2 images; number classes"
    ):
        check_class_numbers(images)


def test_moved_folders(tmp_path: Path) -> None:
    images = index_images(str(photos(tmp_path / "a")))
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(UserError, match=r"a of the cache is gone; if it has moved, give its place with --images"):
        relocate(images, None)
    assert content(relocate(images, str(tmp_path / "b"))) == content(relocate(images, str(tmp_path / "b")))
    first = tmp_path / "b" / (images.files or [""])[0]
    with pytest.raises(UserError, match="of the cache is gone; if it has moved, give the place of its folder"):
        relocate(images, str(photos(tmp_path / "other", "x/y.png")))
    first.write_bytes(b"other")
    with pytest.raises(UserError, match="has changed since it was cached"):
        relocate(images, str(tmp_path / "b"))
    moved = relocate(index_images(str(tmp_path / "b")), None)
    first.write_bytes(b"again")
    with ImageFile(moved) as files:
        assert files.encoded(0)[0] == b"again"
        first.write_bytes(b"longer than before")
        with pytest.raises(UserError, match="the file has changed since it was listed: 5 bytes, now 18"):
            files.encoded(0)
        first.unlink()
        with pytest.raises(UserError, match="No such file or directory; if it has moved, give its place with --images"):
            files.encoded(0)


def test_maps_beside_files(tmp_path: Path) -> None:
    photos(tmp_path / "a", "a.png b.jpg")
    for name in ("a", "b"):
        write(tmp_path / "a" / f"{name}.seg.png", encoded(len(name) + ord(name)))
    for images in (
        index_images(str(tmp_path / "a")),
        index_images(str(write(tmp_path / "l.txt", "a/a.png\na/b.jpg\n"))),
    ):
        maps = content(index_beside(images, "seg.png"))
        assert {key[-1]: data for key, (_, data) in maps.items()} == {
            name: (tmp_path / "a" / f"{name}.seg.png").read_bytes() for name in "ab"
        }
    with pytest.raises(UserError, match=r"sample '.' needs a \.depth\.png beside it, but .\.depth\.png does not exist"):
        index_beside(index_images(str(tmp_path / "a")), "depth.png")


def test_a_million_files_need_no_million_paths(tmp_path: Path) -> None:
    """The listing has columns only, and a reader opens a file when it reads it."""
    photos(tmp_path / "a", " ".join(f"{n}.png" for n in range(30)))
    images = index_images(str(tmp_path / "a"))
    assert images.paths == (tmp_path / "a",) and images.files is not None
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with ImageFile(images) as files:
        for number in range(30):
            files.encoded(number)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208


def test_order_is_a_pure_function_of_names(tmp_path: Path) -> None:
    photos(tmp_path / "a", " ".join(f"{n}.png" for n in range(9)))
    orders = [list(index_images(str(tmp_path / "a"), seed=seed).keys) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
