"""Every kind of image file is read as docs/files.md says, and turned as people see it."""

import io
from pathlib import Path

import numpy as np
import pytest
from files import CASES, COLOURS, PICTURE, Case, chunk, heic, pillow_heif, png, saved, tiff
from PIL import Image, ImageOps

from pipeline.data.decoding import decode_rgb, named_errors, read_size
from pipeline.data.formats import FORMATS, IMAGE_EXTENSIONS
from singer.errors import UserError

PAGE = Path(__file__).parent.parent / "docs" / "files.md"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"


def tables() -> str:
    """The part of docs/files.md that is made from the code and from the files that test_kind reads."""
    lines = ["| format | usual extensions | which image of a file |", "|---|---|---|"]
    for name, about in FORMATS.items():
        lines.append(f"| {name} | {', '.join(about.extensions)} | {about.frames} |")
    lines += ["", "| format | holds | is read |", "|---|---|---|"]
    lines += [f"| {case.format} | {case.holds} | {case.read} |" for case in CASES]
    return "\n".join(lines)


def renewed() -> str:
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def test_the_page_is_the_one_of_these_files() -> None:
    """Write its tables anew by `PYTHONPATH=. python tests/test_files.py`."""
    assert PAGE.read_text() == renewed()


def test_every_format_has_files() -> None:
    assert {case.format for case in CASES} == set(FORMATS)
    assert len(set(IMAGE_EXTENSIONS)) == len(IMAGE_EXTENSIONS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format} {case.holds}")
def test_the_words_of_a_row_are_true(case: Case) -> None:
    """What test_kind proves of the pixels is what the row says: refused, inverted, one of several."""
    assert (case.read == "refused") == isinstance(case.expected, str)
    need(case.format)
    if case.format == "HEIF":
        heic(Image.fromarray(PICTURE))  # registers its decoder
    several = any(word in case.read for word in ("frame", "page", "primary"))
    if several or not isinstance(case.expected, str):
        with Image.open(io.BytesIO(case.data())) as image:
            assert (getattr(image, "n_frames", 1) > 1) == several
            inverted = getattr(image, "tag_v2", {}).get(262) == 0 and image.mode != "1"
            assert inverted == ("inverted" in case.read)


def need(format: str) -> None:
    if format == "HEIF" and pillow_heif is None:
        pytest.skip("pillow-heif is not installed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format} {case.holds}")
def test_kind(case: Case) -> None:
    need(case.format)
    data = case.data()
    if isinstance(case.expected, str):
        with pytest.raises(UserError, match=f"^photo cannot be decoded: .*{case.expected}"), named_errors("photo"):
            decode_rgb(data)
        return
    found = decode_rgb(data)
    assert found.mode == "RGB" and read_size(data) == found.size
    # Flat parts only: lossy formats blur their borders.
    parts = [np.s_[4:12, 4:20], np.s_[4:12, 28:44], np.s_[20:28, 4:20], np.s_[20:28, 28:44]]
    for part in parts if case.near else [np.s_[:]]:
        difference = np.abs(np.asarray(found)[part].astype(int) - case.expected[part])
        assert difference.max() <= case.near, part


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def tagged(kind: str, orientation: int) -> bytes:
    """The picture as a camera stores it, with the orientation that makes it upright."""
    image = Image.fromarray(PICTURE)
    body = exif(orientation).removeprefix(b"Exif\0\0")
    if kind in ("JPEG", "WEBP", "AVIF"):
        return saved(image, kind, exif=exif(orientation), quality=90)
    if kind == "MPO":
        return saved(image, kind, exif=exif(orientation), save_all=True, append_images=[image])
    if kind == "TIFF":
        return tiff(PICTURE, 2, t274=orientation)
    if kind == "TIFF, compressed":
        return saved(image, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation})
    if kind == "PNG":
        return png(PICTURE, 8, 2, before=chunk(b"eXIf", body))
    if kind == "PNG, after the pixels":
        return png(PICTURE, 8, 2, after=chunk(b"eXIf", body))
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    if kind == "PNG, XMP":
        return png(PICTURE, 8, 2, after=chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    assert kind == "JPEG, XMP"
    return saved(image, "JPEG", xmp=xmp)


TAGGED = ("JPEG", "JPEG, XMP", "MPO", "WEBP", "AVIF", "TIFF", "TIFF, compressed")
TAGGED += ("PNG", "PNG, after the pixels", "PNG, XMP")


@pytest.mark.parametrize("kind", TAGGED)
def test_orientation(kind: str) -> None:
    for orientation, turn in UPRIGHT.items():
        data = tagged(kind, orientation)
        expected = turn(PICTURE)
        found = decode_rgb(data)
        assert found.size == read_size(data) == (expected.shape[1], expected.shape[0])
        quarters = np.asarray(found)[found.height // 4 :: found.height // 2, found.width // 4 :: found.width // 2]
        assert np.abs(quarters.astype(int) - turn(COLOURS)).max() < 12, orientation
        with Image.open(io.BytesIO(data)) as image:
            other = ImageOps.exif_transpose(image)
            assert np.array_equal(np.asarray(other.convert("RGB")), np.asarray(found))


def test_orientation_of_heic() -> None:
    """libheif turns it; doing that twice would be as wrong as not at all."""
    need("HEIF")
    for orientation, turn in UPRIGHT.items():
        data = heic(Image.fromarray(PICTURE), exif=exif(orientation))
        found = decode_rgb(data)
        with Image.open(io.BytesIO(data)) as image:
            assert found.size == read_size(data) == image.size
        corner = np.asarray(found)[4, 4].astype(int)
        assert np.abs(corner - turn(COLOURS)[0, 0]).max() < 12, orientation


if __name__ == "__main__":
    PAGE.write_text(renewed())
