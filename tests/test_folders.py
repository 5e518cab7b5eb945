"""Folders of images: links, names of every kind, and what is left out; what prepare writes, the index reads."""

import os
from pathlib import Path

import pytest
from conftest import config_with, draw_images, run_singer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Config
from pipeline.data import Keys, index_beside, index_images
from pipeline.data.image_keys import file_keys
from pipeline.data.tars import UNSAFE
from pipeline.data.walk import printable, walk
from pipeline.stages.prepare import prepare
from singer.errors import UserError


def draw(file: Path, shade: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")


def labels_of(folder: Path, out: Path) -> dict[str, int]:
    """What a cache would hold of the shards that prepare makes of a folder."""
    prepare(config_with(), folder, out)
    images = index_images(str(out / "*.tar"))
    return dict(zip(images.keys, images.labels.tolist(), strict=True))


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root = tmp_path / "in"
    draw(root / "cat" / "a.png")
    draw(tmp_path / "elsewhere" / "deep" / "b.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "cat" / "up").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "cat" / "c.png").symlink_to(root / "cat" / "a.png")
    (tmp_path / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "cat" / "pipe.png")
    assert labels_of(root, tmp_path / "out") == {"cat/a": 0, "cat/c": 0, "cat/more/b": 0, "dog/deep/b": 1}
    found = walk(root, (".png",))
    # `self`, `cat/up`, below `dog` its own `round`, and `deep` below `cat/more/round`
    assert found.folders == ["cat", "dog"]
    assert found.left_out == {"looped folders": 4, "broken links": 1, "no regular files": 1}


def test_links_to_themselves_and_closed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "x.png").symlink_to("x.png")
    (tmp_path / "in" / "y").symlink_to("z")
    (tmp_path / "in" / "z").symlink_to("y")
    assert walk(tmp_path / "in", (".png",)).left_out == {"broken links": 3}

    def closed(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.data.walk.os.scandir", closed)
    with pytest.raises(UserError, match=r"the folder .*/in cannot be read: Permission denied"):
        index_images(str(tmp_path / "in"))


def test_a_file_without_suffix_is_what_it_holds(tmp_path: Path) -> None:
    draw(tmp_path / "in" / "v.1" / "IMG_1")
    draw(tmp_path / "in" / "v.1" / "IMG_1.seg.png")
    (tmp_path / "in" / "v.1" / "README").write_text("no image")
    images = index_images(str(tmp_path / "in"))
    assert list(images.keys) == ["v_1/IMG_1"] and images.left_out == {"without suffix": 1}
    assert index_beside(images, "seg.png").files == Keys.of(["v.1/IMG_1.seg.png"])
    assert labels_of(tmp_path / "in", tmp_path / "out") == {"v_1/IMG_1": 0}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.dat").write_bytes((tmp_path / "in" / "v.1" / "IMG_1").read_bytes())
    with pytest.raises(UserError, match=r"there are only 1 \.dat; if these are images, name them in a list \(\.txt\)"):
        index_images(str(tmp_path / "other"))
    (tmp_path / "l.txt").write_text("other/a.dat")
    assert list(index_images(str(tmp_path / "l.txt")).keys) == ["other/a"]


def test_a_class_is_what_is_reached(tmp_path: Path) -> None:
    """Two names of one folder are two classes, as two copies of it are; an empty one is named with a remedy."""
    draw(tmp_path / "in" / "a" / "x.png")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a")
    assert labels_of(tmp_path / "in", tmp_path / "out") == {"a/x": 0, "b/x": 1}
    (tmp_path / "in" / "c").mkdir()
    with pytest.raises(UserError, match=r"in/c holds no images; remove it, or .*--set prepare.classes=FILE"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out2")
    with pytest.raises(UserError, match=r"in/c holds no images; remove it$"):  # other commands read no such key
        index_images(str(tmp_path / "in"))
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    config = config_with(f"prepare.classes={tmp_path / 'classes.json'}")
    assert prepare(config, tmp_path / "in", tmp_path / "out2").images == 2


def test_every_name_that_a_folder_can_hold_is_read_again(tmp_path: Path) -> None:
    names = [b"back\\slash", b"tab\there", b"line\nbreak", b"no\xffutf", "\x85é".encode(), b"per%cent", b"[x]{1..2}*"]
    names += [b"a.b", b"a_b", b"ok", b"-dash", b" space ", b"..dots", "\u202e".encode()]
    root = os.fsencode(tmp_path / "in")
    for number, name in enumerate(names):
        if not name.startswith(b"."):
            draw(Path(os.fsdecode(root + b"/c\x01/" + name + b".png")), number)
    draw(tmp_path / "in" / "c\x01" / "ok.jpg", 99)
    keys = set(labels_of(tmp_path / "in", tmp_path / "out"))
    assert keys == {f"c%01/{key}" for key in (
        "back%5Cslash", "tab%09here", "line%0Abreak", "no%FFutf", "%C2%85é", "per%cent", "[x]{1__2}*", "a%2Eb%2Epng",
        "a_b%2Epng", "ok%2Epng", "ok%2Ejpg", "-dash", " space ", "\u202e",
    )}  # fmt: skip


@given(st.sets(st.text("aA_.%2EB/\\\t\udcff", min_size=1, max_size=8), max_size=12))
def test_keys_are_safe_and_differ(names: set[str]) -> None:
    files = sorted({name.strip("/.") + ".png" for name in names if "//" not in name})
    keys = file_keys(files)
    assert len(set(keys)) == len(files)
    for key in keys:
        assert not UNSAFE.search(key) and "." not in key and key
    assert dict(zip(files[::-1], file_keys(files[::-1]), strict=True)) == dict(zip(files, keys, strict=True))


def test_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "in"
    draw(root / "a" / "x.PNG")
    for name in ("a/1.txt", "a/2.txt", "b.mov", "a/README", "Thumbs.db", ".DS_Store", "a/.hidden.png", "a/t\tab.t\ty"):
        (root / name).write_text("no image")
    draw(root / ".cache" / "y.png")
    assert run_singer(monkeypatch, "prepare", root, "--out", tmp_path / "out") == 0
    told = capfd.readouterr()
    assert "left out: 3 hidden, 2 .txt, 1 .db, 1 .mov, 1 .t\\ty, 1 without suffix" in told.err
    result = prepare(config_with(), root, tmp_path / "out2")
    assert result.left_out == {".txt": 2, ".mov": 1, ".db": 1, ".t\ty": 1, "without suffix": 1, "hidden": 3}
    (root / "a" / "x.PNG").unlink()
    with pytest.raises(UserError, match=r"no images .* below .*; there are only 3 hidden, 2 \.txt"):
        prepare(config_with(), root, tmp_path / "out3")


def test_the_advice_of_a_failure_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As printed, added to the command that failed; but a folder that is a data set stays."""
    draw(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "line\nbreak.png").write_bytes(b"broken")
    words = ["prepare", tmp_path / "in", "--out", tmp_path / "out"]
    assert run_singer(monkeypatch, *words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    advice = line.rpartition(" with ")[2]
    assert advice == "--on-error skip" and run_singer(monkeypatch, *words, *advice.split()) == 0
    assert len(index_images(str(tmp_path / "out" / "*.tar"))) == 1
    assert run_singer(monkeypatch, *words, *advice.split()) == 2
    assert "out exists; replace it with --overwrite" in capfd.readouterr().err


def test_the_printable_form_is_one_line() -> None:
    assert printable("a\nb\udcff é") == "a\\nb\\udcff é"


def test_any_path_can_be_packed_into(config: Config, tmp_path: Path) -> None:
    """Patterns of names would read a % of the path."""
    draw_images(tmp_path / "photos", 1, 2)
    for out in (tmp_path / "50%" / "shards", tmp_path / "100%data"):
        out.parent.mkdir(exist_ok=True)
        (shard,) = prepare(config, tmp_path / "photos", out).shards
        assert shard.parent == out and len(index_images(str(shard))) == 2
