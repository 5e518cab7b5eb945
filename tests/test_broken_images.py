"""Images of all kinds in shards, read for the teacher: broken ones are named, or left out and listed."""

import hashlib
import struct
import threading
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import saved
from PIL import Image
from tars import noise, png, write_tar
from validating import validate_images

from pipeline.data import ImageFile, index_images
from pipeline.data.decoding import to_rgb
from singer.errors import UserError

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


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
    sixteen = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert np.asarray(to_rgb(sixteen)).tolist() == np.full((2, 2, 3), 128).tolist()
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
