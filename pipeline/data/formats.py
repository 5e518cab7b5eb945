"""The formats of images that singer reads. docs/files.md is made from this table by tests/test_files.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format. extensions: its usual ones, without the dot; frames: which part of a file is the image."""

    extensions: tuple[str, ...]
    frames: str = "one"


# The keys are Pillow's names. No other decoder is tried, because some decoders of Pillow run interpreters.
FORMATS: dict[str, Format] = {
    "JPEG": Format(("jpg", "jpeg", "jpe", "jfif"), "the first of a multi-picture file (MPO)"),
    "PNG": Format(("png",), "the first of an animation"),
    "WEBP": Format(("webp",), "the first of an animation"),
    "AVIF": Format(("avif",), "the first of an animation"),
    "HEIF": Format(("heic", "heif"), "the primary image"),
    "JPEG2000": Format(("jp2", "j2k")),
    "TIFF": Format(("tif", "tiff"), "the first page"),
    "BMP": Format(("bmp",)),
    "GIF": Format(("gif",), "the first of an animation"),
    "PPM": Format(("ppm", "pgm")),
}
# Caches of earlier versions were made with these formats and these extensions alone.
FORMATS_BEFORE = ("JPEG", "PNG", "WEBP")
_EXTENSIONS_BEFORE = ("jpg", "jpeg", "png", "webp")
# Where a sample has several images, the first of these is taken.
IMAGE_EXTENSIONS = tuple(dict.fromkeys((*_EXTENSIONS_BEFORE, *(e for f in FORMATS.values() for e in f.extensions))))
HEIF_EXTRA = "pip install pillow-heif"

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def is_heif(data: bytes) -> bool:
    """Return whether encoded bytes are HEIF and not AVIF: both are in the same container, and name their brands."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS
