"""How the images of a cache are decoded is part of it; and whatever a decoder says, the image has a name."""

import struct
import tarfile
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import seeded, world_config
from files import PICTURE, chunk, pillow_heif, png, saved, tiff
from PIL import Image
from tars import write_tar
from test_files import exif
from validating import validate_images

from pipeline.cache import Cache
from pipeline.data import ImageFile, index_images
from pipeline.data.decoder_warnings import warnings_of, watched_decoders
from pipeline.data.decoding import MAX_PIXELS, decode_rgb, named_errors, read_size
from pipeline.planning.plan import plan
from pipeline.runtime.logs import on_console
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.evaluate import evaluate
from pipeline.stages.prepare import prepare
from pipeline.stages.verify import verify
from pipeline.training.distilling.cached_teachers import open_images
from singer.errors import UserError

SIDEWAYS = 6


def photo(number: int = 0, orientation: int = SIDEWAYS) -> bytes:
    pixels = (
        np.random.default_rng(seeded(number)).integers(0, 256, (3, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    )
    return saved(Image.fromarray(pixels), "JPEG", exif=exif(orientation))


def photos(path: Path, count: int = 8, start: int = 0) -> Path:
    return write_tar(path, {f"{n:03d}.jpg": photo(n) for n in range(start, start + count)})


def test_a_cache_is_of_upright_images(world: Path, tmp_path: Path) -> None:
    """The sensor's pictures of one cache, turned by a quarter, are the upright ones of the other."""
    config, seen = world_config(world, "views.pixels=none"), {}
    for orientation in (1, SIDEWAYS):
        place, turned = tmp_path / f"c{orientation}", {f"{n:03d}.jpg": photo(n, orientation) for n in range(8)}
        cache_teacher(config, str(write_tar(tmp_path / f"{orientation}.tar", turned)), place)
        cache = Cache(place)
        with ImageFile(cache.index.images) as files:
            assert files.dimensions(0) == files.read(0).size == ((64, 48) if orientation == 1 else (48, 64))
            # The centre of the sensor's picture, turned by a quarter, is the centre of the upright one.
            seen[orientation] = cache.pixels([0], 32, files)[0].numpy()
        assert verify(config, place, live=True).whole
    assert np.abs(seen[SIDEWAYS] - np.rot90(seen[1], -1).astype(int)).max() <= 8


def test_sizes_where_the_tag_is_far_from_the_beginning(tmp_path: Path) -> None:
    """After 64 kB: a PNG whose EXIF is after its pixels, and a JPEG with a long comment before its EXIF."""
    noise = np.random.default_rng(seeded(1)).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    tail = png(noise, 8, 2, after=chunk(b"eXIf", exif(8).removeprefix(b"Exif\0\0")))
    jpeg = photo()
    comment = b"\xff\xfe" + struct.pack(">H", 65000) + b" " * 64998
    members = {"a.png": tail, "b.jpg": jpeg[:2] + comment * 2 + jpeg[2:], "c.png": png(noise, 8, 2)}
    with ImageFile(index_images(str(write_tar(tmp_path / "t.tar", members)))) as files:
        assert len(tail) > 1 << 16
        assert [files.dimensions(n) for n in range(3)] == [(150, 200), (48, 64), (200, 150)]
        assert [files.read(n).size for n in range(3)] == [(150, 200), (48, 64), (200, 150)]


def broken_exif() -> dict[str, bytes]:
    beyond = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x010F, 2, 100, 5000) + bytes(4)
    return {
        "none": b"Exif\0\0no TIFF at all",
        "cut": exif(SIDEWAYS)[:9],
        "beyond": beyond,
        "nine": exif(9),
        "zero": exif(0),
    }


@pytest.mark.parametrize("name", broken_exif())
def test_broken_exif_stops_no_image(name: str) -> None:
    data = broken_exif()[name]
    for kind in ("JPEG", "WEBP"):
        with watched_decoders(), named_errors("photo"):
            assert decode_rgb(saved(Image.fromarray(PICTURE), kind, exif=data)).size == (48, 32)
    with watched_decoders(), named_errors("photo"):
        decode_rgb(png(PICTURE, 8, 2, before=chunk(b"eXIf", data.removeprefix(b"Exif\0\0"))))


def test_each_kind_of_warning_is_said_once_with_a_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corrupt = broken_exif()["beyond"]
    members = {f"{n}.jpg": saved(Image.fromarray(PICTURE), "JPEG", exif=corrupt) for n in range(9)}
    members["animation.png"] = png(PICTURE, 8, 2, before=chunk(b"acTL", bytes(8)))
    shard = write_tar(tmp_path / "t.tar", members)
    threads, filters, most = threading.active_count(), list(warnings.filters), Image.MAX_IMAGE_PIXELS
    assert validate_images(index_images(str(shard)), 3, "fail").unreadable == {}
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(lines) == 2 and all(f"in {shard}: " in line for line in lines), lines
    assert any("Skipping tag 271" in line for line in lines)
    assert any("image 'animation'" in line and "Invalid APNG" in line for line in lines)
    assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (filters, most) and threading.active_count() <= threads


def test_dark_images_of_16_bits_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    for most, said in ((200, True), (4095, True), (4096, False)):
        with on_console(), watched_decoders(), warnings_of(f"photo {most}"):
            decode_rgb(tiff(np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)))
        assert (f"photo {most}: its numbers are at most {most} of 65535" in capfd.readouterr().err) == said


@pytest.mark.parametrize(
    ("data", "guess"),
    [
        (b"\xff\xd8\xff junk", "it begins as JPEG, but is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS, .*: git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "it is a page in HTML"),
        (b"%PDF-1.4", "it begins with b'%PDF-1.4'"),
    ],
)
def test_what_is_no_image_is_described(data: bytes, guess: str) -> None:
    with pytest.raises(UserError, match=f"^a cannot be decoded: cannot identify .*; {guess}"), named_errors("a"):
        decode_rgb(data)


def test_watches_overlap_in_any_order() -> None:
    """Two generators that read images are not closed in the order of their opening."""
    before = warnings.showwarning, Image.MAX_IMAGE_PIXELS
    one, two = watched_decoders(), watched_decoders()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert warnings.showwarning is not before[0] and Image.MAX_IMAGE_PIXELS is None
    two.__exit__(None, None, None)
    assert (warnings.showwarning, Image.MAX_IMAGE_PIXELS) == before


def test_warnings_of_others_pass() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watched_decoders():
            warnings.warn("of another library", stacklevel=1)
    assert [str(w.message) for w in caught] == ["of another library"]


def limits() -> dict[str, bytes]:
    """What Pillow refuses for its own limits."""
    return {
        "text": png(PICTURE, 8, 2, before=chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * (3 << 20)))),
        "profile": png(PICTURE, 8, 2, before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20)))),
        "nan": tiff(np.full((4, 4), np.nan, np.float32)),
        "unsigned": tiff(np.full((4, 4), 3_000_000_000, np.uint32)),
        "empty": b"",
        "short": b"\xff\xd8",
    }


@pytest.mark.parametrize("name", limits())
def test_every_refusal_names_the_image(name: str, tmp_path: Path) -> None:
    data = limits()[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{name}.png").write_bytes(data)
    with pytest.raises(UserError, match=f"^{tmp_path}/in/{name}.png cannot be decoded: .*; remove it"):
        prepare(world_config(tmp_path), tmp_path / "in", tmp_path / "out")
    if data:
        images = index_images(str(write_tar(tmp_path / "t.tar", {f"{name}.png": data})))
        with ImageFile(images) as files, pytest.raises(UserError, match=f"^image '{name}' in .* cannot be decoded: "):
            files.read(0)


@pytest.mark.skipif(pillow_heif is not None, reason="pillow-heif is installed")
def test_heic_without_its_package_says_what_to_install() -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)
    with (
        pytest.raises(UserError, match=r"^photo cannot be decoded: .*pip install 'singer-vit\[heif\]'"),
        named_errors("photo"),
    ):
        decode_rgb(data)


def test_prepare_keeps_every_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = Image.fromarray(PICTURE)
    files = {
        "a.JPG": saved(image, "MPO", save_all=True, append_images=[image]),
        "b.tiff": tiff(PICTURE, 2),
        "c.bmp": saved(image, "BMP"),
        "d.gif": saved(image.quantize(16), "GIF"),
        "e.ppm": saved(image, "PPM"),
        "f.avif": saved(image, "AVIF"),
        "g.jp2": saved(image, "JPEG2000"),
        "h.jpeg": saved(image, "WEBP"),
        "i.png": photo(),
    }
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    result = prepare(world_config(tmp_path), tmp_path / "in", tmp_path / "out")
    with tarfile.open(result.shards[0]) as tar:
        packed = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    as_named = {name.lower().replace("jpeg", "jpg"): data for name, data in files.items()}
    assert packed == as_named and result.skipped == []
    found = validate_images(index_images(str(result.shards[0])), 2, "fail")
    assert len(found.images) == len(files) and found.unreadable == {}


@pytest.mark.parametrize(
    ("kind", "limit", "size"),
    [
        ("JPEG", 48 * 32, (48, 32)),
        ("JPEG", 48 * 32 - 1, (24, 16)),
        ("JPEG", 24 * 16 - 1, (12, 8)),
        ("JPEG", 12 * 8 - 1, (6, 4)),
        ("JPEG", 5, (6, 4)),  # no decoder makes it smaller
        ("MPO", 24 * 16, (24, 16)),
        ("JPEG2000", 24 * 16, (24, 16)),
        ("JPEG2000", 12 * 8, (12, 8)),
        ("PNG", 5, (48, 32)),
    ],
)
def test_a_very_large_image_is_decoded_smaller(
    kind: str, limit: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 100 million pixels are a few: within the limit that the user sets, colours stay, and sizes agree."""
    monkeypatch.setattr("pipeline.data.decoding.MAX_PIXELS", limit)
    options: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]} if kind == "MPO" else {}
    for orientation in (1, 6) if kind == "JPEG" else (1,):
        tag = {"exif": exif(orientation)} if kind == "JPEG" else {}
        data = saved(Image.fromarray(PICTURE), kind, **options, **tag)
        found = decode_rgb(data, max_pixels=48 * 32)
        assert found.size == read_size(data, max_pixels=48 * 32) == (size if orientation == 1 else size[::-1])
        whole = Image.fromarray(PICTURE if orientation == 1 else np.rot90(PICTURE, -1).copy()).resize(found.size)
        edge = np.s_[:1, :1]
        assert np.abs(np.asarray(found)[edge].astype(int) - np.asarray(whole)[edge]).max() < 12
    with pytest.raises(Image.DecompressionBombError, match=r"48 x 32 .*--set data\.max_pixels=1536 allows"):
        decode_rgb(data, max_pixels=48 * 32 - 1)


def test_the_key_reaches_every_reader(world: Path, tmp_path: Path) -> None:
    """What is refused by one command is allowed in the words of its message; students and checks of a cache follow."""
    shard = photos(tmp_path / "a.tar")
    small = "data.max_pixels=3071"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(photo())
    with pytest.raises(UserError, match=r"in/a\.jpg .*--set data\.max_pixels=3072 allows"):
        prepare(world_config(world, small), tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"'000' in .*a\.tar .*--set data\.max_pixels=3072 allows"):
        cache_teacher(world_config(world, small), str(shard), tmp_path / "c")
    with pytest.raises(UserError, match=r"a\.tar .*--set data\.max_pixels=3072 allows"):
        plan(world_config(world, small), str(shard), seconds=0)
    assert cache_teacher(world_config(world, "data.max_pixels=3072"), str(shard), tmp_path / "c", "resume").records == 8
    cache = Cache(tmp_path / "c")
    with open_images(cache) as files:
        assert files is not None and files.images.max_pixels > MAX_PIXELS
    assert verify(world_config(world, small), tmp_path / "c", live=True).whole
    with pytest.raises(UserError, match=r"--set data\.max_pixels=\d+ allows"):
        images = str(world / "test" / "*.tar")
        evaluate(world_config(world, "data.max_pixels=100"), world / "teacher", None, images, "retrieval")
