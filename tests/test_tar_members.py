"""Which members of a shard are images, labels and maps, and what their keys are."""

import bz2
import gzip
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sources import content, encoded, write
from tars import png, write_tar

from pipeline.data import index_beside, index_images
from pipeline.runtime.logs import on_console
from singer.errors import UserError


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
