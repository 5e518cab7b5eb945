"""Shards: expansion, index, images, and what prepare writes."""

import hashlib
import io
import json
import struct
import tarfile
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import config_with, draw_images, seeded, tree_bytes
from files import saved
from hypothesis import given
from hypothesis import strategies as st
from mutate import headers, mutations
from PIL import Image
from validating import validate_images
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data import (
    ImageFile,
    Keys,
    Skipped,
    content_hash,
    index_images,
    listing_hash,
    resolve,
)
from pipeline.data.decoding import to_rgb
from pipeline.data.source_listing import NO_LABEL
from pipeline.stages.prepare import prepare
from singer.errors import UserError

Members = dict[str, bytes] | list[tuple[str, bytes]]


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    return saved(Image.new(mode, size))


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seeded(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_tar(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def patch_header(path: Path, number: int, start: int, value: bytes) -> Path:
    """Bytes of the number-th header of a tar are others; its checksum fits."""
    data = bytearray(path.read_bytes())
    at = headers(bytes(data))[number]
    data[at + start : at + start + len(value)] = value
    data[at + 148 : at + 156] = b"        "
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    return path


def read_with_webdataset(paths: Iterable[Path]) -> list[dict[str, bytes]]:
    """Samples as the webdataset library groups them (its own file opener leaves files open)."""
    samples = []
    for path in paths:
        with path.open("rb") as stream:
            samples += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return samples


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


def sound_tar(path: Path) -> bytes:
    write_tar(path, {f"{n}.{e}": d for n in "abc" for e, d in (("png", png((64, 64))), ("cls", b"7"))})
    return path.read_bytes()


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


def damage(path: Path, change: Callable[[bytes], bytes]) -> tuple[list[str], list[Skipped]]:
    """The keys that are left of a damaged tar and what is listed; without "skip" the first defect is raised."""
    path.write_bytes(change(sound_tar(path)))
    with pytest.raises(UserError) as error:
        index_images(str(path))
    assert str(error.value).startswith(f"{path} ")
    images = index_images(str(path), "skip")
    assert str(error.value).startswith(f"{path} {images.skipped[0].reason}; repair it")
    return list(images.keys), list(images.skipped)


def test_damaged_shards(tmp_path: Path) -> None:
    """What is before the damage stays, less the sample that touches it: its label may be lost."""
    path = tmp_path / "bad.tar"
    sample = 2 * 512 + 2 * 512  # header, image, header, label
    lost = "may have lost members: the shard is damaged after it"
    assert 0 < len(png((64, 64))) <= 512
    for change, reason in (
        (lambda d: d[: 2 * sample], "has no end-of-archive marker"),
        (lambda d: d[: 2 * sample - 512], "ends in the middle of a member"),
        (lambda d: d[: 2 * sample - 512 - 100], "ends in the middle of a header"),
        (lambda d: d[: 2 * sample] + b"x" * 512 + d[2 * sample :], f"is unreadable from byte {2 * sample}"),
        (
            lambda d: d[: 2 * sample] + bytes(512) + d[2 * sample + 512 :],
            f"holds more than zeros from byte {2 * sample} on, after its end-of-archive marker",
        ),
    ):
        keys, skipped = damage(path, change)
        assert keys == ["a"] and skipped == [Skipped("bad.tar", "", reason), Skipped("bad.tar", "b", lost)]
    whole = sound_tar(path)
    path.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512 + 512))
    assert len(index_images(str(path))) == 3  # one block of zeros is enough
    path.write_bytes(path.read_bytes()[:-1])
    assert index_images(str(path), "skip").skipped[0].reason == "ends in the middle of a header"
    path.write_bytes(whole + whole)  # two archives one after the other
    assert "holds more than zeros" in index_images(str(path), "skip").skipped[0].reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "has no end-of-archive marker"),
        (b"short", "ends in the middle of a header"),
        (b"x" * 2048, "is not an uncompressed tar"),
        (zlib.compress(bytes(9)) * 99, "is not an uncompressed tar"),
    ],
)
def test_no_tar_at_all(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    write_tar(tmp_path / "good.tar", {"a.png": png()})
    with pytest.raises(UserError, match=rf"bad\.tar {reason}; repair it"):
        index_images(str(tmp_path / "*.tar"))
    images = index_images(str(tmp_path / "*.tar"), "skip")
    assert list(images.keys) == ["a"] and images.skipped == (Skipped("bad.tar", "", reason),)
    with pytest.raises(UserError, match=rf"no images in .*bad\.tar; the first defect: bad\.tar {reason}"):
        index_images(str(tmp_path / "bad.tar"), "skip")
    with pytest.raises(UserError, match=r"no images in [^,]*empty\.tar$"):
        index_images(str(write_tar(tmp_path / "empty.tar", {})))


TERABYTE = b"\x80" + (1 << 40).to_bytes(11, "big")


@pytest.mark.parametrize("kind", [b"0", b"7", b"L", b"K", b"x", b"g", b"X", b"S", b"M", b"?"])
@pytest.mark.parametrize(
    "size", [TERABYTE, b"\xff" * 11 + b"\0", b"\x80" + b"\xff" * 11, b"-0000000777\0", b"rubbish rub\0"]
)
def test_hostile_sizes_take_no_memory(tmp_path: Path, kind: bytes, size: bytes) -> None:
    """Nor any time: a negative size would lead tarfile back to where it was."""
    sound_tar(tmp_path / "t.tar")
    path = patch_header(tmp_path / "t.tar", 4, 124, size + b"00000000000\0" + bytes(8) + kind)
    tracemalloc.start()
    images = index_images(str(path), "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20 and list(images.keys) == ["a"]
    assert images.skipped[0].reason in ("is unreadable from byte 4096", "ends in the middle of a member")


def pax_member(payload: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    header = tarfile.TarInfo("extra")
    header.type, header.size = kind, len(payload)
    return header.tobuf() + payload + bytes(-len(payload) % 512)


@pytest.mark.parametrize(
    "payload",
    [
        b"rubbish",
        b"0 path=x\n",
        b"-9 path=x\n",
        b"99 path=x\n",
        b"9 path=x",
        b"10 path\n\n\n",
        b" 9 path=x\n",
        b"10 size=x1\n",
        b"11 size=-512\n"[:12],
        b"9" * 5000 + b" size=1\n",
        b"5020 size=" + b"9" * 5009 + b"\n",
        b"30 size=99999999999999999999999\n"[:32].replace(b"30", b"32"),
        b"7 a.=b\n" * 3 + b"7",
        b"11 qath=xy\n",
        bytes(600),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
def test_hostile_pax_headers(tmp_path: Path, payload: bytes, kind: bytes) -> None:
    path = tmp_path / "t.tar"
    whole = sound_tar(path)
    path.write_bytes(whole[:4096] + pax_member(payload, kind) + whole[4096:])
    images = index_images(str(path), "skip")
    assert list(images.keys) == ["a"]
    assert images.skipped[0].key == "" and images.skipped[1].key == "b"


def test_forged_extended_headers(tmp_path: Path) -> None:
    """One that passes for a file, or the other way round, would leave the member after it with a cut-off name."""
    name = "folder-" * 20
    path = tmp_path / "t.tar"
    for number, kind, form in (
        (4, b"0", tarfile.GNU_FORMAT),  # a long name is a file
        (4, b"K", tarfile.GNU_FORMAT),  # a long name is the target of a link that is not a link
        (4, b"7", tarfile.PAX_FORMAT),  # an extended header is a file
        (3, b"L", tarfile.USTAR_FORMAT),  # a file is a long name
        (3, b"K", tarfile.USTAR_FORMAT),
    ):
        last = "c" if form == tarfile.USTAR_FORMAT else name
        write_tar(path, {"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2", "b.cls": b"2", f"{last}.jpg": b"3"}, form)
        assert list(index_images(str(path)).keys) == ["a", "b", last]
        images = index_images(str(patch_header(path, number, 156, kind)), "skip")
        assert list(images.keys) == ["a"]
        assert images.skipped[0].key == "" and images.skipped[0].reason.startswith("is unreadable from byte")
    write_tar(path, {"a.jpg": b"1", "b.jpg": b"1", f"{name}.jpg": b"3"}, tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[data.find(name.encode()) + 1] = 0  # the name ends before its header says
    path.write_bytes(data)
    assert list(index_images(str(path), "skip").keys) == ["a"]


def test_sparse_files_are_passed_over(tmp_path: Path) -> None:
    """Of GNU: the first header has room for four holes, each further block for 21; only images must not be sparse."""
    path = tmp_path / "t.tar"
    whole = sound_tar(path)
    for name, reason in (("a.npy", None), ("x.png", "has an image that is not a regular file")):
        header = tarfile.TarInfo(name)
        header.type, header.size = tarfile.GNUTYPE_SPARSE, 3
        block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
        block[482] = 1
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        holes = bytes(504) + b"\1" + bytes(7) + bytes(512)
        path.write_bytes(bytes(block) + holes + b"abc".ljust(512, b"\0") + whole)
        images = index_images(str(path), "skip")
        assert list(images.keys) == ["a", "b", "c"]
        assert [s.reason for s in images.skipped] == ([reason] if reason else [])
    path.write_bytes(bytes(block) + holes[:700])
    with pytest.raises(UserError, match="ends in the middle of a member"):
        index_images(str(path))


def test_odd_but_honest_headers(tmp_path: Path) -> None:
    """A size in a pax header, a global header, sparse files, and a header of which the member is missing."""
    path = tmp_path / "t.tar"
    whole = sound_tar(path)
    size = len(png((64, 64)))
    record = b"12 size=%03d\n" % size
    zero = whole[4096:]
    path.write_bytes(whole[:4096] + pax_member(record) + zero)
    patch_header(path, 5, 124, b"00000000000\0")
    assert index_images(str(path)).size.tolist() == [size] * 3
    path.write_bytes(pax_member(b"13 comment=x\n", tarfile.XGLTYPE) + whole)
    assert list(index_images(str(path)).keys) == ["a", "b", "c"]
    sparse = b"22 GNU.sparse.major=1\n" + b"29 GNU.sparse.name=real.webp\n"
    path.write_bytes(whole[:4096] + pax_member(sparse) + zero)
    images = index_images(str(path), "skip")
    assert list(images.keys) == ["a", "b"]
    assert images.skipped[0] == Skipped("t.tar", "real", "has an image that is not a regular file")
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[:end] + pax_member(record) + bytes(1024))
    assert index_images(str(path), "skip").skipped[0].reason == f"is unreadable from byte {end + 1024}"
    path.write_bytes(whole[:4096] + pax_member(record) * 2 + zero)
    assert index_images(str(path), "skip").skipped[0].reason == "is unreadable from byte 5120"
    path.write_bytes(whole[:4096] + pax_member(b"\0" * (2 << 20)) + zero)
    assert index_images(str(path), "skip").skipped[0].reason == "is unreadable from byte 4096"


KINDS = {
    "grey": lambda: (noise().convert("L"), "JPEG"),
    "cmyk": lambda: (noise().convert("CMYK"), "JPEG"),
    "colour": lambda: (noise(), "JPEG"),
    "alpha": lambda: (noise().convert("RGBA"), "PNG"),
    "grey alpha": lambda: (noise().convert("LA"), "PNG"),
    "16 bits": lambda: (Image.fromarray(np.full((30, 40), 32768, dtype=np.uint16)), "PNG"),
    "palette": lambda: (noise().convert("P"), "PNG"),
    "bits": lambda: (noise().convert("1"), "PNG"),
    "webp": lambda: (noise().convert("RGBA"), "WEBP"),
}


def test_survey(tmp_path: Path) -> None:
    """All modes and formats, under any extension; each with its digest and size."""
    pictures = {name: saved(*make()) for name, make in KINDS.items()}
    pictures["progressive"] = saved(noise(), "JPEG", progressive=True)
    pictures["clear palette"] = saved(noise().convert("P"), "PNG", transparency=bytes(range(256)))
    members = {f"{name}.jpg": data for name, data in pictures.items()}
    images = index_images(str(write_tar(tmp_path / "t.tar", members)))
    for workers in (1, 3):
        found = validate_images(images, workers, "fail")
        assert list(found.images.keys) == list(pictures) and found.unreadable == {}
        assert found.found["digest"].tolist() == [
            int.from_bytes(hashlib.sha256(data).digest()[:8], "little") for data in pictures.values()
        ]
        assert set(found.found["width"].tolist()) == {40} and set(found.found["height"].tolist()) == {30}
    with ImageFile(images) as files:
        assert [files.dimensions(i) for i in range(len(images))] == [(40, 30)] * len(images)
        assert {files.read(i).mode for i in range(len(images))} == {"RGB"}


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_images() -> dict[str, bytes]:
    large = noise(200, 200)
    return {
        "text.jpg": b"hello",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "icon.png": saved(large, "ICO"),
        "cut.jpg": saved(large, "JPEG")[:-200],
        "cut-progressive.jpg": saved(large, "JPEG", progressive=True)[:-2000],
        "cut.png": saved(large)[:-200],
        "cut.webp": saved(large, "WEBP")[:-200],
        "flipped.png": saved(large)[:3000] + b"\0" * 30 + saved(large)[3030:],
        "many.png": bomb(10_001, 10_000),
        "bomb.png": bomb(1 << 30, 1 << 30),
        "line.png": bomb(200_000_000, 1),
    }


@pytest.mark.parametrize("name", broken_images())
def test_broken_images_are_named_or_listed(tmp_path: Path, name: str) -> None:
    members = {"first.png": png(), name: broken_images()[name], "last.png": png((5, 6))}
    images = index_images(str(write_tar(tmp_path / "t.tar", {**members, "a.cls": b"1"})), "skip")
    key = name.split(".")[0]
    with pytest.raises(UserError) as error:
        validate_images(images, 2, "fail")
    assert str(error.value).startswith(f"image '{key}' in {images.paths[0]} cannot be decoded: ")
    remedies = "--resume --on-error skip (--append --on-error skip, if it was being appended)"
    assert str(error.value).endswith(f"; repair it and start anew, or go on without it: {remedies}")
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    tracemalloc.start()
    found = validate_images(images, 2, "skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    ((broken, reason),) = found.unreadable.items()
    assert ("pixels are too many" in reason) == (key in ("many", "bomb", "line")), reason
    assert list(found.images.keys) == ["first", "last"] and found.images.size.tolist() == [len(png()), len(png((5, 6)))]
    assert found.found["width"].tolist() == [4, 5] and found.found["height"].tolist() == [4, 6]
    assert [(s.shard, s.key) for s in found.images.skipped] == [("t.tar", "a")] and broken == key
    with ImageFile(found.images) as files:
        assert files.read(1).size == (5, 6)
    with ImageFile(images) as files, pytest.raises(UserError, match=f"image '{key}' in .*t.tar cannot be decoded"):
        files.read(1)


def test_survey_leaves_warnings_as_they_were(tmp_path: Path) -> None:
    """PIL warns in threads, where the filters of the process hold."""
    images = index_images(str(write_tar(tmp_path / "t.tar", {"a.png": bomb(20_000, 10_000), "b.png": png()})))
    threads = threading.active_count()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        assert list(validate_images(images, 3, "skip").images.keys) == ["b"]
        assert warnings.filters == before
    assert not caught and threading.active_count() <= threads


def test_too_many_pixels(tmp_path: Path) -> None:
    images = index_images(str(write_tar(tmp_path / "t.tar", {"a.png": png((20, 20)), "b.png": png()})))
    images = replace(images, max_pixels=399)
    with (
        ImageFile(images) as files,
        pytest.raises(UserError, match="20 x 20 pixels are too many; --set data.max_pixels=400 allows them"),
    ):
        files.read(0)
    assert validate_images(images, 1, "skip").unreadable == {
        "a": "20 x 20 pixels are too many; --set data.max_pixels=400 allows them"
    }


def fuzzed_tar(path: Path) -> bytes:
    """Every kind of header and image; without the padding to 10 kB, of which damage would do nothing."""
    long = "folder-" * 20
    names = ["alpha", "beta", "gamma", "delta", "epsilon", f"{long}zeta", f"{long}eta"]
    pictures = [
        ("png", saved(noise(8, 9, 1))),
        ("jpg", saved(noise(60, 40, 2), "JPEG")),
        ("webp", saved(noise(20, 20, 3), "WEBP")),
        ("jpeg", saved(noise(30, 30, 4), "JPEG", progressive=True)),
        ("png", saved(noise(16, 16, 5))),
        ("png", saved(noise(5, 5, 6))),
        ("jpg", saved(noise(9, 30, 7), "JPEG")),
    ]
    parts = []
    for form, chosen in ((tarfile.PAX_FORMAT, slice(0, 6)), (tarfile.GNU_FORMAT, slice(6, 7))):
        pairs = list(zip(names, pictures, range(len(names)), strict=True))[chosen]
        members = [m for n, (e, d), i in pairs for m in ((f"{n}.{e}", d), (f"{n}.cls", b"%d" % i))]
        data = write_tar(path, members, form).read_bytes().rstrip(b"\0")
        parts.append(data + bytes(-len(data) % 512))
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path.read_bytes()


def test_no_damage_goes_unseen(tmp_path: Path) -> None:
    """A damaged tar is refused with a sentence, or gives what is sound and lists the rest.

    No checksum covers the data of members nor the long names of extended headers, and whole members that are cut out
    of an archive leave no trace. All else is seen: unless something is listed, an image is only missing where its name
    is in no header any more (zeroed, cut out, renamed, or within what another header claims as its data), and a label
    only where the same is true of its own name; and a new name is a long one, or a header was forged.
    """
    path = tmp_path / "t.tar"
    data = fuzzed_tar(path)
    whole = validate_images(index_images(str(path)), 1, "fail")
    assert len(whole.images) == 7
    original = dict(zip(whole.images.keys, whole.found["digest"].tolist(), strict=True))
    labels = dict(zip(whole.images.keys, whole.images.labels.tolist(), strict=True))
    outcomes = dict.fromkeys(("refused", "listed", "as before", "lost without trace"), 0)
    for what, damaged in mutations(data, 150, seeded(1)):
        path.write_bytes(damaged)
        try:
            found = validate_images(index_images(str(path), "skip"), 1, "skip")
        except UserError as error:
            assert str(path) in str(error) or "can be decoded" in str(error), what
            assert "\n" not in str(error), what
            outcomes["refused"] += 1
            continue
        images = found.images
        if not len(images):
            outcomes["refused"] += 1
            continue
        got = dict(zip(images.keys, found.found["digest"].tolist(), strict=True))
        assert len(got) == len(images), what
        assert images.size.min() > 0 and (images.offset + images.size).max() <= len(damaged), what
        new = got.keys() - original.keys()
        assert all(len(key) > 100 for key in new) or what.startswith("header"), what
        if images.skipped or found.unreadable:
            outcomes["listed"] += 1
            continue
        names = bytearray(damaged)
        with tarfile.open(path) as tar:
            for member in tar:
                padded = -(-member.size // 512) * 512
                names[member.offset_data : member.offset_data + padded] = bytes(padded)
        renamed = {got[key] for key in new}
        lost = [key for key in original.keys() - got.keys() if original[key] not in renamed]
        assert not [key for key in lost if f"{key}.".encode() in names], what
        unlabelled = [k for k, n in zip(images.keys, images.labels, strict=True) if n == NO_LABEL and k in labels]
        assert not [key for key in unlabelled if f"{key}.cls".encode() in names], what
        outcomes["lost without trace" if lost else "as before"] += 1
    assert outcomes["listed"] > 60 and outcomes["lost without trace"] < 15, outcomes


def test_mutations_are_repeatable(tmp_path: Path) -> None:
    data = sound_tar(tmp_path / "t.tar")
    once = list(mutations(data, 25, 0))
    assert once == list(mutations(data, 25, 0)) != list(mutations(data, 25, 1))
    assert {what.split(":")[0] for what, _ in once} == {"flip", "cut", "zero", "splice", "header"}
    assert sum(damaged != data for _, damaged in once) > 20


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
    sixteen = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert np.asarray(to_rgb(sixteen)).tolist() == np.full((2, 2, 3), 128).tolist()
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    members = {"a.png": png(), "a.cls": b"-1\n", "b.png": png(), "b.cls": b"1"}
    images = index_images(str(write_tar(tmp_path / "t.tar", members)))
    assert images.labels.tolist() == [NO_LABEL, 1]


def test_prepare_image_folder(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", 3, 4)
    (tmp_path / "in" / "class0" / "a.b.jpg").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class0" / "a.b.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class1" / "bitmap.bmp")
    Image.new("L", (5, 5)).save(tmp_path / "in" / "class1" / "0.seg.png")
    result = prepare(config_with("prepare.shard_images=5"), tmp_path / "in", tmp_path / "out")
    assert (result.images, result.classes, len(result.shards)) == (14, ["class0", "class1", "class2"], 3)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == result.classes
    images = index_images(str(tmp_path / "out" / "*.tar"))
    labels = dict(zip(images.keys, images.labels.tolist(), strict=True))
    assert labels["class0/a_b"] == 0 and labels["class2/3"] == 2 and labels["class1/bitmap"] == 1
    masks = [s for s in read_with_webdataset(result.shards) if "seg.png" in s]
    assert [s["__key__"] for s in masks] == ["class1/0"]
    again = prepare(config_with("prepare.shard_images=5"), tmp_path / "in", tmp_path / "again" / "out")
    assert tree_bytes(result.out, "provenance.json") == tree_bytes(again.out, "provenance.json")


def test_prepare_flat_and_skipping(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "bad.png").write_bytes(png()[:30])
    with pytest.raises(UserError, match=r"bad\.png cannot be decoded.*--on-error skip"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    result = prepare(config_with("data.on_error=skip"), tmp_path / "in", tmp_path / "out")
    assert (result.images, result.classes, [p.name for p in result.skipped]) == (1, [], ["bad.png"])


def test_prepare_numbers_classes_alike(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 3, 2)
    prepare(config_with(), tmp_path / "train", tmp_path / "out" / "train")
    draw_images(tmp_path / "val", 3, 2)
    for file in (tmp_path / "val" / "class1").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="class folder .*class1 holds no images"):
        prepare(config_with(), tmp_path / "val", tmp_path / "out" / "val")
    (tmp_path / "val" / "class1").rmdir()
    (tmp_path / "val" / ".cache").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / ".cache" / "x.png")
    config = config_with(f"prepare.classes={tmp_path / 'out' / 'train' / 'classes.json'}")
    result = prepare(config, tmp_path / "val", tmp_path / "out" / "val")
    assert result.classes == ["class0", "class1", "class2"] and result.images == 4
    assert sorted(index_images(str(tmp_path / "out" / "val" / "*.tar")).labels) == [0, 0, 2, 2]
    (tmp_path / "val" / "class9").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / "class9" / "x.png")
    with pytest.raises(UserError, match="has no class 'class9'"):
        prepare(config, tmp_path / "val", tmp_path / "out" / "val2")


def test_prepare_drops_nothing_silently(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("mountain_depth", "boxseg"):
        Image.new("RGB", (5, 5)).save(tmp_path / "in" / f"{name}.png")
    assert prepare(config_with(), tmp_path / "in", tmp_path / "out").images == 2
    Image.new("L", (5, 5)).save(tmp_path / "in" / "lost.seg.png")
    with pytest.raises(UserError, match=r"lost\.seg\.png has no image beside it"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out2")


def test_prepare_opens_no_other_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: cannot identify image file"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_prepare_refusals(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    config = config_with()
    with pytest.raises(UserError, match="no images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "loose.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "c" / "a.jpg")
    with pytest.raises(UserError, match="mixes class folders and loose images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "loose.jpg").unlink()
    with pytest.raises(UserError, match="overlaps the input"):
        prepare(config, tmp_path / "in", tmp_path / "in" / "out")
    assert not (tmp_path / "out").exists()


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
