"""Decode images. Archives may be hostile: images are decoded with care, nothing is unpickled."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.config import MAX_PIXELS
from pipeline.data.decoder_warnings import warn, warnings_of
from pipeline.data.formats import FORMATS, format_of, is_heif
from pipeline.runtime.error_kinds import one_line
from singer.errors import UserError

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tag of TIFF: what its samples are.
_SAMPLE_FORMAT = 339
# Numbers of 16 bits below this fill at most a sixteenth of the range: mostly 8 or 12 bits that were not scaled.
_DARK = 1 << 12
_SIDEWAYS = (5, 6, 7, 8)
# Pillow gives the size and the pixels of these as they are after turning.
_TURNED_BY_PILLOW = ("TIFF", "HEIF")
_EXIF_FIRST = ("JPEG", "MPO")
# A PNG may have its EXIF after the pixels, in a chunk with one of these names. Without them there is no need to look.
_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as RGB, and turn it as its EXIF says.

    An image of more than MAX_PIXELS is decoded smaller, if its format can do that. Raises whatever a decoder raises,
    and DecompressionBombError for more than max_pixels.
    """
    image = open_image(data, tuple(FORMATS), max_pixels)
    image.load()
    turn = _TURNS.get(orientation(image))
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def read_size(data: bytes, max_pixels: int = MAX_PIXELS, whole: bool = True) -> tuple[int, int]:
    """Return the (width, height) that decode_rgb gives.

    whole: whether data are all bytes of the image, or the first ones. Raises whatever a decoder raises, and EOFError if
    the size may depend on later bytes.
    """
    image = open_image(data, tuple(FORMATS), max_pixels)
    width, height = image.size
    if width == height or image.format in _TURNED_BY_PILLOW:
        return width, height
    if image.format == "PNG" and whole:
        if not any(mark in data for mark in _PNG_MARKS):
            return width, height
        image.load()
    elif not whole and image.format not in _EXIF_FIRST:
        raise EOFError("later bytes may turn it")
    return (height, width) if orientation(image) in _SIDEWAYS else (width, height)


def decode(data: bytes, where: str, formats: Sequence[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image, such as a map, as it is stored. Raises UserError that begins with `where` if that fails."""
    with named_errors(where):
        image = open_image(data, formats, max_pixels)
        image.load()
        return image


def open_image(data: bytes, formats: Sequence[str], max_pixels: int) -> Image.Image:
    """Open an image of some formats and sane size, without decoding it. Its content decides what it is."""
    if "HEIF" in formats and is_heif(data):
        _register_heif()
        tried = ["HEIF"]
    else:
        tried = [name for name in formats if name != "HEIF"]
    try:
        image = Image.open(io.BytesIO(data), formats=tried)
    except UnidentifiedImageError:
        # PIL's own message names an address in memory, which differs in every run.
        raise UnidentifiedImageError(f"cannot identify image file as {', '.join(formats)}; {_guess(data)}") from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        allowed = f"--set data.max_pixels={pixels} allows them"
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many; {allowed}")
    if pixels > MAX_PIXELS:
        _decode_smaller(image)
    return image


def _guess(data: bytes) -> str:
    """Return what bytes that are no image seem to be."""
    name = format_of(data)
    if name in FORMATS:
        return f"it begins as {name}, but is damaged, or of a kind that the decoder does not know"
    if data.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, whose file was not fetched: git lfs pull"
    if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a page in HTML, as of a download that failed"
    return f"it begins with {data[:12]!r}" if data else "it is empty"


def _decode_smaller(image: Image.Image) -> None:
    """Let a JPEG or JPEG 2000 be decoded at a half, a quarter or an eighth of its sides: at most MAX_PIXELS."""
    width, height = image.size
    power = next(n for n in (1, 2, 3) if width * height >> 2 * n <= MAX_PIXELS or n == 3)
    factor = 1 << power
    if isinstance(image, JpegImageFile):
        image.draft(None, (width // factor, height // factor))
    # Pillow rounds the sides of JPEG 2000 in another way than its decoder, which shows in other sizes.
    elif image.format == "JPEG2000" and (factor == 2 or width % factor == height % factor == 0):
        image.reduce = power  # type: ignore[assignment, method-assign]
        image.load()


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("it is HEIC (HEIF), which needs pillow-heif: pip install 'singer-vit[heif]'") from None
    register_heif_opener()


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if there is none, or a broken one."""
    try:
        found = image.getexif().get(Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except Exception as error:  # Pillow raises many kinds of errors on broken EXIF
        warn("exif", f"its EXIF is broken, so it is not turned: {one_line(error, None)}")
        return 1


@contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a UserError that begins with `where`, and name its warnings."""
    with warnings_of(where):
        try:
            yield
        except Exception as error:  # decoders raise many kinds of errors on broken data
            raise UserError(f"{where} cannot be decoded: {one_line(error, None)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, 8 bits a channel. Transparent images get a white background.

    Profiles of colour (ICC) are not applied. Raises ValueError for numbers without a known range, see _eight_bits.
    """
    signed = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) == (2,) and image.mode == "L"
    if signed and np.asarray(image).max() > 127:
        raise ValueError("its 8 bits have a sign, and some are negative; store them without a sign")
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Scale a grey image of more than 8 bits to 8 bits, (H, W) uint8.

    16 bits lose their lower half. Integers of 32 bits are taken as 8 bits if they fit, or else as 16 bits; floats are
    within 0 to 1. Raises ValueError, with the range that was found, for other numbers.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tags = getattr(image, "tag_v2", {})
    white_is_zero = image.mode.startswith(("I;", "F")) and tags.get(262) == 0
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # NaN, too
            raise ValueError(f"its floats are from {low:g} to {high:g}; scale them to 0 to 1, or store 8 or 16 bits")
        scaled: np.ndarray = (values * 255 + 0.5).astype(np.uint8)
        return ~scaled if white_is_zero else scaled
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"its integers are from {low} to {high}; scale them to 0 to 65535, or store 8 or 16 bits")
    bits = 12 if tags.get(258) == (12,) else 16
    if image.mode == "I" and image.format == "TIFF" and high <= 0xFF:
        bits = 8
    if bits == 16 and 0 < high < _DARK:
        warn(
            "dark", f"its numbers are at most {high} of 65535, so it becomes nearly black; scale them, or store 8 bits"
        )
    grey: np.ndarray = (values >> (bits - 8)).astype(np.uint8)
    return ~grey if white_is_zero else grey
