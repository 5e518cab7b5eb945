"""Damaged and forged tars: what is sound is read, and the rest is named."""

import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import seeded
from files import saved
from mutate import mutations
from tars import noise, patch_header, png, sound_tar, write_tar
from validating import validate_images

from pipeline.data import Skipped, index_images
from pipeline.data.source_listing import NO_LABEL
from singer.errors import UserError


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
