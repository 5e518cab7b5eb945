"""Sources of images: what names them, and folders, lists and tables beside shards."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from files import saved
from tars import noise, png, write_tar

from pipeline.cache.index import image_bytes, read_images
from pipeline.config import load_config
from pipeline.data import (
    ImageFile,
    Images,
    check_class_numbers,
    index_beside,
    index_images,
    list_probe_images,
    numbered_as,
    places_of,
    relocate,
    resolve,
)
from pipeline.data.images import read_classes
from pipeline.data.specs import braces
from pipeline.runtime.logs import on_console
from pipeline.storage import LocalStore
from singer.errors import UserError

pyarrow = pytest.importorskip("pyarrow")


def encoded(seed: int, kind: str = "PNG") -> bytes:
    return saved(noise(8, 6, seed), kind)


def write(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def content(images: Images) -> dict[str, tuple[int, bytes]]:
    with ImageFile(images) as files:
        return {key: (int(images.labels[n]), files.encoded(n)[0]) for n, key in enumerate(images.keys)}


def photos(root: Path, names: str = "cat/a.png cat/b.jpg dog/c.png") -> Path:
    for number, name in enumerate(names.split()):
        write(root / name, encoded(number, "JPEG" if name.endswith("jpg") else "PNG"))
    return root


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


def pairs(root: Path) -> list[tuple[str, str]]:
    photos(root / "img")
    return [("img/cat/a.png", "cat"), ("img/cat/b.jpg", "cat"), ("img/dog/c.png", "dog"), ("img/cat/a b.png", "")]


@pytest.mark.parametrize("form", ["txt", "tab", "csv", "headed.csv", "tsv", "jsonl"])
def test_lists_of_every_form(form: str, tmp_path: Path) -> None:
    rows = pairs(tmp_path)
    write(tmp_path / rows[3][0], encoded(3))
    lines = {
        "txt": [f"{name} {label}".strip() for name, label in rows],
        "tab": ["\t".join(row) for row in rows],
        "csv": [",".join(row) for row in rows],
        "headed.csv": ["id,Class,File_Name", *(f"{n},{label},{name}" for n, (name, label) in enumerate(rows))],
        "tsv": ["image\tlabel", *("\t".join(row) for row in rows)],
        "jsonl": [json.dumps({"file_name": name, "label": label or None, "x": [1]}) for name, label in rows],
    }[form]
    suffix = "txt" if form == "tab" else form.rpartition(".")[2]
    text = "\ufeff" + "\r\n".join(lines) + "\r\n\r\n"
    images = index_images(str(write(tmp_path / f"list.{suffix}", text)))
    assert list(images.keys) == ["img/cat/a", "img/cat/b", "img/dog/c", "img/cat/a b"]
    assert images.labels.tolist() == [0, 0, 1, -1] and images.classes == ("cat", "dog")
    assert [data for _, data in content(images).values()] == [
        (tmp_path / name).read_bytes() for name, _ in rows
    ]  # fmt: skip
    assert images.paths == (tmp_path,) and relocate(images, str(tmp_path / f"list.{suffix}")).paths == (tmp_path,)


def test_numbers_in_lists_are_class_numbers(tmp_path: Path) -> None:
    photos(tmp_path)
    images = index_images(str(write(tmp_path / "l.csv", "cat/a.png,7\ncat/b.jpg,-1\ndog/c.png,\n")))
    assert images.labels.tolist() == [7, -1, -1] and images.classes == ()
    outside = write(tmp_path / "sub" / "l.txt", f"../cat/a.png 1\n{tmp_path}/dog/c.png 2\n")
    images = index_images(str(outside))
    assert list(content(images).values()) == [
        (1, (tmp_path / "cat/a.png").read_bytes()),
        (2, (tmp_path / "dog/c.png").read_bytes()),
    ]


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("l.csv", "cat/a.png;4\ncat/b.jpg;5\n", [4, 5]),
        ("l.csv", "filename,class_name\ncat/a.png,x\ncat/b.jpg,y\n", [0, 1]),
        ("l.csv", ",image_path,label\n0,cat/a.png,10.0\n1,cat/b.jpg,\n2,dog/c.png,2.\n", [10, -1, 2]),
        ("l.csv", "path,label\ncat/a.png,nan\ncat/b.jpg,-1.0\n", [-1, -1]),
        ("l.csv", "path,label\ncat/a.png,1.0\ncat/b.jpg,x\n", [0, 1]),
        ("l.jsonl", '{"file_name": "cat/a.png", "labels": 3.0}\n{"path": "cat/b.jpg", "label": NaN}', [3, -1]),
        ("l.txt", "~/cat/a.png 1\nfile://HOME/cat/b.jpg 2\n", [1, 2]),
        ("l.txt", "# path label\ncat/a.png 1\n # cat/b.jpg 3\n#\tcat/b.jpg\n./#b.png 2\n", [1, 2]),
    ],
)
def test_lists_as_programs_write_them(
    name: str, text: str, labels: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path)
    write(tmp_path / "#b.png", encoded(2))
    monkeypatch.setenv("HOME", str(tmp_path))
    text = text.replace("HOME", str(tmp_path))
    assert index_images(str(write(tmp_path / name, text))).labels.tolist() == labels
    (tmp_path / name).write_text(text, encoding="utf-16")
    assert index_images(str(tmp_path / name)).labels.tolist() == labels


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "path,label\ncat/a.png,0.5\ncat/b.jpg,1", "has the label 0.5, which is no class number"),
        ("l.txt", "https://host/a.png 1", "https://host/a.png is in a list, and lists hold files"),
        (
            "l.jsonl",
            '{"path": "a", "label": [1, 2]}',
            r"line 1 has the label \[1, 2\], which is no class number or name",
        ),
        (
            "l.csv",
            "path,label\ncat/a.png,1\ncat/no.png,2",
            r"'cat/no' \(cat/no\.png\) does not exist in .*, where the list is; repair",
        ),
        ("l.txt", "cat 1", r"\(cat\) is not a regular file"),
        ("l.txt", "cat/a.png 1\ncat/a.png 2", r"sample 'cat/a%2Epng' occurs twice"),
        ("l.txt", "\n\n", "l.txt is empty"),
        ("l.txt", "cat/a.png 2147483648", "has the label 2147483648; class numbers are 0 to 2147483647"),
        ("l.csv", '"cat/a.png,1', "l.csv is not a list of images: "),
        ("l.csv", "label,path\nx", "l.csv is not a list of images: row 2 has no path"),
        ("l.jsonl", '{"path": 3}', "line 1 is not an object with path or image or file_name"),
        ("l.jsonl", '{"path": "a", "label": true}', "line 1 has the label True, which is no class number or name"),
        ("l.jsonl", "[1]", "line 1 is not an object with"),
        ("l.jsonl", "{", "l.jsonl is not a list of images: line 1 is not JSON"),
        ("l.jsonl", '{"path": "cat/a.png"}\n{bad', "line 2 is not JSON .*, character 2"),
        ("l.jsonl", r'{"path": "\ud800"}', "does not exist"),
        ("l.txt", "a\0b 1", "does not exist"),
    ],
)
def test_wrong_lists(name: str, text: str, message: str, tmp_path: Path) -> None:
    photos(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        index_images(str(write(tmp_path / name, text)))
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


def table(path: Path, columns: dict[str, object], rows_a_group: int = 2, hf: dict[str, object] | None = None) -> Path:
    import pyarrow.ipc
    import pyarrow.parquet

    made = pyarrow.table(columns)
    if hf is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hf}})})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path, row_group_size=rows_a_group)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=rows_a_group)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    data = [encoded(n) for n in range(5)]
    columns = {
        "image": [{"bytes": d, "path": None} for d in data],
        "thumb": [{"bytes": b"x", "path": None}] * 5,
        "label": [1, 0, -1, None, 1],
    }
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
    file = table(tmp_path / f"t.{suffix}", columns, hf=features)
    for spec in (str(file), str(tmp_path)):
        images = index_images(spec)
        assert [images.labels.tolist(), images.classes] == [[1, 0, -1, -1, 1], ("dog", "cat")]
        assert list(images.keys)[:2] == ["t/000000", "t/000001"]
        assert [read for _, read in content(images.select(np.array([4, 0, 3, 1, 2]))).values()] == [
            data[n] for n in (4, 0, 3, 1, 2)
        ]
    with ImageFile(images) as files:
        assert files.dimensions(2) == (8, 6) and files.encoded(1, 4)[0] == data[1][:4]
    with pytest.raises(UserError, match=r"t\.\w+: sample 't/000000' has no \.seg\.png: tables have no maps"):
        index_beside(images, "seg.png")
    plain = table(tmp_path / f"u.{suffix}", {k: columns[k] for k in ("image", "thumb")})
    with pytest.raises(UserError, match=r"has 2 columns of images .*; choose one with --set data.image_key=image"):
        index_images(str(plain))
    assert index_images(str(plain), image_key="thumb").size.tolist() == [1] * 5
    with pytest.raises(UserError, match=r"data.image_key: .* has no column 'x' of images"):
        index_images(str(plain), image_key="x")


def test_tables_with_faults(tmp_path: Path) -> None:
    file = table(tmp_path / "a.parquet", {"img": [b"x", b"", None], "cls": ["b", "a", "b"]})
    with pytest.raises(UserError, match=r"sample 'a/000001' \(row 1\) has no bytes of an image"):
        index_images(str(file))
    other = table(tmp_path / "b.parquet", {"img": [b"y"], "cls": ["c"]})
    images = index_images([str(file), str(other)], "skip")
    assert list(images.keys) == ["a/000000", "b/000000"] and len(images.skipped) == 2
    assert images.labels.tolist() == [1, 2] and images.classes == ("a", "b", "c")
    table(other, {"img": [b"changed"], "cls": ["c"]})
    with ImageFile(images) as files, pytest.raises(UserError, match="row 0 has changed since it was listed"):
        files.encoded(1)
    for name, data in (("c.parquet", b"PAR1 no"), ("c.arrow", b"no")):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a table"):
            index_images(str(write(tmp_path / name, data)))
    with pytest.raises(UserError, match=r"has 0 columns of images \(none\)$"):
        index_images(str(table(tmp_path / "d.parquet", {"x": [1]})))
    with pytest.raises(UserError, match=r"0 columns of images \(none\); if 'p' holds paths, write them to a list"):
        index_images(str(table(tmp_path / "d.parquet", {"p": ["a.png"]})))
    floats = table(tmp_path / "f.parquet", {"i": [b"x", b"y", b"z"], "label": [3.0, float("nan"), None]})
    assert index_images(str(floats)).labels.tolist() == [3, -1, -1]
    with pytest.raises(UserError, match="'label' holds no class numbers or names: 1.5"):
        index_images(str(table(tmp_path / "e.parquet", {"i": [b"x"], "label": [1.5]})))


def test_many_tables_are_open_a_few_at_a_time(tmp_path: Path) -> None:
    for n in range(80):
        table(tmp_path / f"{n:02}.parquet", {"image": [encoded(n), encoded(n + 1)]})
    images = index_images(sorted(map(str, tmp_path.glob("*.parquet"))))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ImageFile(images) as files:
        for number in (*range(160), 0):
            assert files.encoded(number)[0] == encoded(number // 2 + number % 2)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 40


def test_without_pyarrow_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"need pyarrow: pip install 'singer-vit\[parquet\]'"):
        index_images(str(write(tmp_path / "a.parquet", b"")))


@pytest.mark.parametrize("prefix", ["~/", "file://"])
def test_lists_take_blanks_in_whole_paths(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my photos" / "a b.png", encoded(1))
    place = "my photos/a b.png" if prefix == "~/" else f"{tmp_path}/my photos/a b.png"
    images = index_images(str(write(tmp_path / "list.txt", f"{prefix}{place}\n")))
    assert len(images) == 1 and images.labels.tolist() == [-1]


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


def test_a_list_with_other_paths_names_the_same_files(tmp_path: Path) -> None:
    photos(tmp_path / "a")
    listed = sorted((tmp_path / "a").rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{path} {n}\n" for n, path in enumerate(listed)))
    images = index_images(str(tmp_path / "list.txt"))
    before = content(images)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(
        UserError, match="of the cache is gone; if it has moved, give the place of its folder, or a list"
    ):
        relocate(images, None)
    (tmp_path / "list.txt").write_text((tmp_path / "list.txt").read_text().replace("/a/", "/b/"))
    assert content(relocate(images, str(tmp_path / "list.txt"))) == before


def test_a_list_reads_the_folder_of_its_images(tmp_path: Path) -> None:
    """Outputs may be beside the list, and not among the images."""
    photos(tmp_path / "photos")
    (tmp_path / "list.txt").write_text("photos/cat/a.png 0\nphotos/dog/c.png 1\n")
    (tmp_path / "one.txt").write_text("photos/dog/c.png 1\n")
    write_tar(tmp_path / "x.tar", {"a.png": png()})
    specs = [str(tmp_path / name) for name in ("list.txt", "one.txt", "photos", "x.tar")]
    places = [{*places_of(index_images(spec))} for spec in specs]
    cat, dog = (tmp_path / "photos" / name for name in ("cat", "dog"))
    assert places == [{cat, dog}, {dog}, {cat, dog}, {tmp_path / "x.tar"}]
    # Folders that have nothing in common but the root; a name that leads through others.
    elsewhere = photos(tmp_path / "other" / "deep", "c.png deeper/d.png")
    (tmp_path / "photos" / "far.txt").write_text("../other/deep/c.png 0\n../other/deep/deeper/d.png 1\ncat/a.png 1\n")
    assert {*places_of(index_images(str(tmp_path / "photos" / "far.txt")))} == {elsewhere, cat}


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


def test_dots_in_names(tmp_path: Path) -> None:
    a, b = encoded(1), encoded(2)
    one = write_tar(tmp_path / "a.tar", {"a/22.05.png": a, "a/22.05.cls": b"4", "a/23.06.png": b, "a/23.06.cls": b"5"})
    assert content(index_images(str(one))) == {"a/22": (4, a), "a/23": (5, b)}
    assert content(index_images(str(one), image_key=".png")) == {"a/22.05": (4, a), "a/23.06": (5, b)}
    two = write_tar(tmp_path / "b.tar", {"s.input.jpg": a, "s.left.jpg": b, "s.cls": b"3", "s.left.seg.png": b"m"})
    with pytest.raises(UserError, match=r"'s' has several images \(input.jpg, left.jpg\), since a key ends") as e:
        index_images(str(two))
    assert "--set data.image_key=input.jpg" in str(e.value) and "--set data.image_key=.jpg" in str(e.value)
    assert content(index_images(str(two), image_key="left.jpg")) == {"s": (3, b)}
    assert content(index_images(str(two), "skip", ".jpg")) == {"s.input": (-1, a), "s.left": (-1, b)}
    with pytest.raises(UserError, match=r"has no \.right\.jpg \(data\.image_key\); it has input\.jpg, left\.jpg"):
        index_images(str(two), image_key="right.jpg")
    maps = write_tar(tmp_path / "c.tar", {"x.png": a, "x.seg.png": b, "y.seg.png": b, "y.png": a})
    assert content(index_beside(index_images(str(maps)), "seg.png")) == {"x": (-1, b), "y": (-1, b)}


def test_members_that_are_no_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """macOS adds ._NAME to every file; folders may have dots; other members are counted."""
    a, other = encoded(1), tarfile.TarInfo("v1.2")
    other.type = tarfile.DIRTYPE
    members = {
        "./._a.png": b"x",
        "./a.png": a,
        "v1.2/._b.png": b"y",
        "v1.2/b.png": a,
        "README": b"z",
        ".DS_Store": b"!",
    }
    path = write_tar(tmp_path / "t.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.addfile(other)
    with on_console():
        images = index_images(str(path))
    assert set(content(images)) == {"./a", "v1.2/b"} and images.left_out == {"hidden": 3, "without suffix": 1}
    assert "left out: 3 hidden, 1 without suffix" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"no images in [^,]*u\.tar; there are only 2 without suffix"):
        index_images(str(write_tar(tmp_path / "u.tar", {"a": a, "b": a})))


def test_an_image_may_have_any_extension(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {"s.img": encoded(1), "s.cls": b"3"})
    with pytest.raises(UserError, match=r"if \.img is the image, say so: --set data\.image_key=img; repair it"):
        index_images(str(path))
    assert content(index_images(str(path), image_key="img")) == {"s": (3, encoded(1))}
    assert content(index_images(str(path), image_key=".img")) == {"s": (3, encoded(1))}


def test_members_that_are_apart_are_joined(tmp_path: Path) -> None:
    members = {f"{n}.png": encoded(ord(n)) for n in "abc"} | {f"{n}.cls": b"%d" % ord(n) for n in "cab"}
    path = write_tar(tmp_path / "t.tar", members)
    assert content(index_images(str(path))) == {n: (ord(n), encoded(ord(n))) for n in "abc"}


def test_a_cut_among_labels_leaves_no_image_without_its_own(tmp_path: Path) -> None:
    members = {f"{n}.png": encoded(ord(n)) for n in "abc"} | {f"{n}.cls": b"%d" % ord(n) for n in "abc"}
    data = write_tar(tmp_path / "t.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    at = data.index(b"c.cls")
    (tmp_path / "t.tar").write_bytes(data[:at])
    images = index_images(str(tmp_path / "t.tar"), "skip")
    assert {key: label for key, (label, _) in content(images).items()} == {"a": 97, "b": 98}


def test_sources_that_number_alike(tmp_path: Path) -> None:
    for name in ("x/s-0", "x/s-1", "y/s-0"):
        write_tar(write(tmp_path / f"{name}.tar", b""), {"000.png": encoded(len(name)), f"{name[0]}.png": encoded(3)})
    keys = list(index_images([str(tmp_path / "x"), str(tmp_path / "y")]).keys)
    assert keys == ["000", "x", "x/s-1/000", "x/s-1/x", "y/s-0/000", "y"]
    maps = write_tar(tmp_path / "m.tar", {"000.png": encoded(1), "000.seg.png": b"mask"})
    both = index_images([str(tmp_path / "x" / "s-0.tar"), str(maps)])
    assert list(both.keys)[-1] == "m/000"
    assert content(index_beside(both.select(np.array([2])), "seg.png")) == {"m/000": (-1, b"mask")}


@pytest.mark.parametrize(
    ("name", "command", "compress"),
    [
        ("t.tar.gz", "gunzip", gzip.compress),
        ("t.tar.bz2", "bunzip2", bz2.compress),
        ("t.txz", "unxz", lzma.compress),
        ("t.TLZ", "unlzma", partial(lzma.compress, format=lzma.FORMAT_ALONE)),
        ("t.tar.lz4", "lz4 -d", None),
        ("t.tar", "gunzip", gzip.compress),
    ],
)
def test_compressed_tars_say_how_to_unpack(
    name: str, command: str, compress: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    """By a command that works as it is printed."""
    plain = write_tar(tmp_path / "plain.tar", {"a.png": png()}).read_bytes()
    (tmp_path / "a b").mkdir()
    path = tmp_path / "a b" / name
    path.write_bytes(b"\x04\x22\x4d\x18" if compress is None else compress(plain))
    with pytest.raises(UserError, match=rf"is compressed, but .*; unpack it: {command} < '.*{name}' > '.*'") as error:
        index_images(str(path.parent))
    if compress is not None and shutil.which(command):
        how = str(error.value).partition("unpack it: ")[2].partition(";")[0]
        subprocess.run(how, shell=True, check=True)
        (unpacked,) = [file for file in path.parent.iterdir() if file != path]
        assert unpacked.suffix == ".tar" and unpacked.read_bytes() == plain


def test_order_is_a_pure_function_of_names(tmp_path: Path) -> None:
    photos(tmp_path / "a", " ".join(f"{n}.png" for n in range(9)))
    orders = [list(index_images(str(tmp_path / "a"), seed=seed).keys) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
