"""Shards: their names, what an index says of their images, and samples with a defect."""

import hashlib
import io
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import saved
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tars import Members, noise, patch_header, png, read_with_webdataset, write_tar

from pipeline.data import ImageFile, Keys, Skipped, content_hash, index_images, listing_hash, resolve
from pipeline.data.source_listing import NO_LABEL
from singer.errors import UserError


def test_expand(tmp_path: Path) -> None:
    for i in range(12):
        write_tar(tmp_path / f"t-{i:04d}.tar", {})
    names = [p.name for p in resolve(str(tmp_path / "t-{0002..0004}.tar"))]
    assert names == ["t-0002.tar", "t-0003.tar", "t-0004.tar"]
    assert len(resolve(str(tmp_path / "*.tar"))) == 12
    assert len(resolve([str(tmp_path / "t-0000.tar"), str(tmp_path / "t-001*.tar")])) == 3
    with pytest.raises(UserError, match="nothing matches '.*x-"):
        resolve(str(tmp_path / "x-*.tar"))
    with pytest.raises(UserError, match=r"t-0012.tar does not exist \(nor 1 more\)"):
        resolve(str(tmp_path / "t-{0010..0013}.tar"))
    with pytest.raises(UserError, match="given twice"):
        resolve([str(tmp_path / "t-0000.tar")] * 2)


def test_index_agrees_with_webdataset(world: Path) -> None:
    images = index_images(str(world / "train" / "*.tar"))
    samples = read_with_webdataset(images.paths)
    assert [s["__key__"] for s in samples] == list(images.keys)
    assert [int(s["cls"]) for s in samples] == images.labels.tolist()
    with ImageFile(images) as files:
        for number, sample in enumerate(samples):
            expected = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
            np.testing.assert_array_equal(np.asarray(files.read(number)), expected)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path: Path, form: int) -> None:
    long = "folder/" * 12 + "é" * 10 + "x" * 40
    if form != tarfile.USTAR_FORMAT:
        long += "y" * 300
    names = ["a.jpg", "a.cls", "a.json", "README", ".hidden.jpg", "./b.JPEG", f"{long}.webp", f"{long}.cls", "c.x.png"]
    path = write_tar(tmp_path / "t.tar", [*((n, b"%d" % i * 3) for i, n in enumerate(names)), ("c.png", b"c")], form)
    images = index_images(str(path))
    assert list(images.keys) == ["a", "./b", long, "c"] and images.skipped == ()
    assert images.labels.tolist() == [111, NO_LABEL, 777, NO_LABEL]
    with tarfile.open(path) as tar:
        members = [tar.getmember(name) for name in ("a.jpg", "./b.JPEG", f"{long}.webp", "c.png")]
    assert images.offset.tolist() == [m.offset_data for m in members]
    assert images.size.tolist() == [m.size for m in members] == [3, 3, 3, 1]
    assert [c.dtype for c in (images.labels, images.container)] == [np.int32] * 2
    assert [c.dtype for c in (images.offset, images.size)] == [np.int64] * 2


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_keys_are_a_sequence(names: list[str]) -> None:
    keys = Keys.of(names)
    assert list(keys) == [*keys] == names and len(keys) == len(names) and tuple(reversed(keys)) == tuple(names[::-1])
    assert list(keys[1:]) == names[1:] and list(keys[::-2]) == names[::-2]
    assert list(Keys(keys.text, keys.ends)) == names
    for number in (-1, 0):
        if names:
            assert keys[number] == names[number]
    for number in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            keys[number]


def test_keys_are_small_and_checked() -> None:
    tracemalloc.start()
    keys = Keys.of(f"class{i % 10}/{i}" for i in range(100_000))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100_000 * 21 and keys[99_999] == "class9/99999"
    for ends in ([1, 3], [3, 1, 2], [-1, 2], []):
        with pytest.raises(UserError, match="do not divide their 2 bytes"):
            Keys(np.zeros(2, dtype=np.uint8), np.array(ends, dtype=np.int64))


def test_hashes(tmp_path: Path) -> None:
    """place_hash knows where images lie; listing_hash and content_hash do not."""
    a = {"a.jpg": b"1", "a.cls": b"3", "é/b.png": b"22", "é/b.cls": b"4"}
    write_tar(tmp_path / "t-0.tar", a)
    write_tar(tmp_path / "t-1.tar", {"c.webp": b"333"})
    images = index_images(str(tmp_path / "t-*.tar"))
    digest = np.arange(3, dtype=np.uint64)
    one = index_images(str(write_tar(tmp_path / "one.tar", {**a, "c.webp": b"333"}, tarfile.USTAR_FORMAT)))
    assert one.place_hash() != images.place_hash()
    same = content_hash(images, digest)
    assert content_hash(one, digest) == same
    assert content_hash(one, digest[::-1]) != same
    assert content_hash(replace(one, labels=one.labels + 1), digest) != same
    assert content_hash(replace(one, keys=Keys.of(["a", "é/b", "d"])), digest) != same
    names = "aé/bc".encode() + np.array([1, 5, 6], "<i8").tobytes() + np.array([3, 4, -1], "<i4").tobytes()
    assert same == hashlib.sha256(names + digest.astype("<u8").tobytes()).hexdigest()
    assert listing_hash(images) == listing_hash(one)
    assert listing_hash(one) == hashlib.sha256(names + np.array([1, 2, 3], "<i8").tobytes()).hexdigest()
    assert listing_hash(replace(one, size=one.size + 1)) != listing_hash(one)


DEFECTS: dict[str, tuple[Members, str, str]] = {
    "no image": ({"a.cls": b"3"}, "a", "has no image (jpg, jpeg, jpe, jfif, mpo, png, "),
    "program": (
        {"a.pyd": b"cos\nsystem\n", "a.pth": b"", "a.cls": b"1"},
        "a",
        "has no image (jpg, jpeg, jpe, jfif, mpo, png, ",
    ),
    "label -2": ({"a.png": png(), "a.cls": b"-2"}, "a", "has a label that is not a class number: b'-2'"),
    "word for a label": ({"a.png": png(), "a.cls": b"x"}, "a", "has a label that is not a class number: b'x'"),
    "negative label": ({"a.png": png(), "a.cls": b"-3"}, "a", "has a label that is not a class number: b'-3'"),
    "huge label": ({"a.png": png(), "a.cls": b"2147483648"}, "a", "has a label that is not a class number"),
    "endless label": ({"a.png": png(), "a.cls": b"0" * 4000 + b"1"}, "a", "has a label that is not a class number"),
    "empty label": ({"a.png": png(), "a.cls": b""}, "a", "has a label that is not a class number: b''"),
    "empty image": ({"a.png": b"", "a.cls": b"1"}, "a", "has an empty image"),
    "twice": ({"good.png": png(), "x.png": png(), "good.jpg": png()}, "good", "occurs twice"),
    "same name twice": ([("good.png", png()), ("good.png", b"other")], "good", "has two members .png"),
    "same name in capitals": ([("good.png", png()), ("good.PNG", b"other")], "good", "has two members .png"),
    "two labels": ([("good.png", png()), ("good.cls", b"3"), ("good.cls", b"4")], "good", "has two members .cls"),
    "absolute": ({"/etc/a.png": png()}, "/etc/a", "has the unsafe name '/etc/a.png'"),
    "parent": ({"../a.png": png()}, "../a", "has the unsafe name '../a.png'"),
    "parent within": ({"b/../a.png": png(), "b/../a.cls": b"1"}, "b/../a", "has the unsafe name 'b/../a.cls'"),
    "parent and no extension": ({"b/..": png()}, "b/..", "has the unsafe name 'b/..'"),
    "backslash": ({"b\\a.png": png()}, "b\\\\a", r"has the unsafe name 'b\\a.png'"),
    "control character": ({"a\x1b[2J.png": png()}, "a\\x1b[2J", r"has the unsafe name 'a\x1b[2J.png'"),
    "line break": ({"a\nb.png": png()}, "a\\nb", r"has the unsafe name 'a\nb.png'"),
    "no UTF-8": ({"a\udcff.png": png()}, "a\\udcff", r"has the unsafe name 'a\udcff.png'"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defective_samples(tmp_path: Path, name: str) -> None:
    """Each is named, or left out and listed; the sound samples around it stay."""
    members, key, reason = DEFECTS[name]
    members = [*(members.items() if isinstance(members, dict) else members)]
    form = tarfile.GNU_FORMAT if name == "no UTF-8" else tarfile.PAX_FORMAT
    if name == "no UTF-8":  # written as the byte that it stands for
        path = write_tar(tmp_path / "bad.tar", [("first.png", png()), ("a?.png", png()), ("last.png", png())], form)
        patch_header(path, 1, 0, b"a\xff.png")
    else:
        path = write_tar(tmp_path / "bad.tar", [("first.png", png()), *members, ("last.png", png())], form)
    with pytest.raises(UserError) as error:
        index_images(str(path))
    assert str(error.value).startswith(f"{path}: sample '{key}' {reason}") and "\n" not in str(error.value)
    assert str(error.value).endswith("; repair it, or leave it out with --on-error skip")
    images = index_images(str(path), "skip")
    left = {"first", "last", *(["good"] if key == "good" else []), *(["x"] if name == "twice" else [])}
    assert set(images.keys) == left and len(images) == len(left)
    (skipped,) = images.skipped
    assert (skipped.shard, skipped.key) == ("bad.tar", key) and skipped.reason.startswith(reason)
    if name == "two labels":
        assert images.labels.tolist() == [NO_LABEL, 3, NO_LABEL]


def test_duplicates_across_shards(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", {"a.png": png(), f"b{number}.png": png()})
    images = index_images(str(tmp_path / "*.tar"))
    assert list(images.keys) == ["a", "b0", "1/a", "b1"] and images.container.tolist() == [0, 0, 1, 1]
    write_tar(tmp_path / "1.tar", {"a.png": png(), "1/a.png": png()})
    images = index_images(str(tmp_path / "*.tar"), "skip")
    assert list(images.keys) == ["a", "b0", "1/a"] and images.skipped == (Skipped("1.tar", "1/a", "occurs twice"),)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("extension", ["jpg", "cls"])
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes, extension: str) -> None:
    (tmp_path / "secret").write_bytes(saved(noise(), "JPEG"))
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", png()), ("a.cls", b"1"), ("b.png", png())):
            info = tarfile.TarInfo(name)
            if name == f"a.{extension}":
                info.type, info.linkname = kind, str(tmp_path / "secret")
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    images = index_images(str(path), "skip")
    assert list(images.keys) == ["b"]
    reason = {"jpg": "has an image that is not a regular file", "cls": "has a label that is not a class number: its"}
    (skipped,) = images.skipped
    assert (skipped.shard, skipped.key) == ("t.tar", "a") and skipped.reason.startswith(reason[extension])


def test_links_among_other_members_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("a.json", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    images = index_images(str(path))
    assert list(images.keys) == ["a"] and images.skipped == ()


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    members = {"a.png": png(), "a.cls": b"-1\n", "b.png": png(), "b.cls": b"1"}
    images = index_images(str(write_tar(tmp_path / "t.tar", members)))
    assert images.labels.tolist() == [NO_LABEL, 1]


def test_the_label_of_an_image_with_dots_in_its_extension(tmp_path: Path) -> None:
    """A key ends at its first dot, for the label as for the image; a plain .cls comes first."""
    shard = write_tar(
        tmp_path / "x.tar",
        [
            *(("a.v2.png", png()), ("a.v2.cls", b"3")),
            *(("b.v2.png", png()), ("b.v1.cls", b"4")),
            *(("c.v2.png", png()), ("c.v2.cls", b"5"), ("c.cls", b"6")),
        ],
    )
    images = index_images(str(shard))
    assert dict(zip(images.keys, images.labels.tolist(), strict=True)) == {"a": 3, "b": NO_LABEL, "c": 6}
    write_tar(shard, [("a.v2.png", png()), ("a.v2.cls", b"cat")])
    with pytest.raises(UserError, match="has a label that is not a class number: b'cat'"):
        index_images(str(shard))
