"""Lists of images: every form, labels as programs write them, and what is wrong with one."""

import json
from pathlib import Path

import pytest
from sources import content, encoded, photos, write
from tars import png, write_tar

from pipeline.data import index_images, places_of, relocate
from singer.errors import UserError


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


@pytest.mark.parametrize("prefix", ["~/", "file://"])
def test_lists_take_blanks_in_whole_paths(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my photos" / "a b.png", encoded(1))
    place = "my photos/a b.png" if prefix == "~/" else f"{tmp_path}/my photos/a b.png"
    images = index_images(str(write(tmp_path / "list.txt", f"{prefix}{place}\n")))
    assert len(images) == 1 and images.labels.tolist() == [-1]


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
