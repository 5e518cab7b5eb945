"""The formats of images that singer reads. docs/files.md is made from this table by tests/test_files.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format. extensions: its usual ones, without the dot; frames: which part of a file is the image."""

    extensions: tuple[str, ...]
    frames: str = "one"


# The keys are Pillow's names. No other decoder is tried, because some decoders of Pillow run interpreters.
FORMATS: dict[str, Format] = {
    "JPEG": Format(("jpg", "jpeg", "jpe", "jfif", "mpo"), "the first of a multi-picture file (MPO)"),
    "PNG": Format(("png", "apng"), "the first of an animation"),
    "WEBP": Format(("webp",), "the first of an animation"),
    "AVIF": Format(("avif",), "the first of an animation"),
    "HEIF": Format(("heic", "heif", "hif"), "the primary image"),
    "JPEG2000": Format(("jp2", "j2k", "j2c", "jpf", "jpx")),
    "TIFF": Format(("tif", "tiff"), "the first page"),
    "BMP": Format(("bmp",)),
    "GIF": Format(("gif",), "the first of an animation"),
    "PPM": Format(("ppm", "pgm", "pbm", "pnm")),
}
# Where a sample has several images, the first of these is taken.
IMAGE_EXTENSIONS = tuple(extension for about in FORMATS.values() for extension in about.extensions)
# The suffixes of image files, and the extension that each has in shards.
KEPT = {f".{extension}": extension for extension in IMAGE_EXTENSIONS} | {".jpeg": "jpg"}

# How files of these formats begin. BMP and PPM begin with two letters only, as many a text does.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF8": "GIF",
}
# So many bytes tell the format.
START_BYTES = 32
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def is_heif(data: bytes) -> bool:
    """Return whether encoded bytes are HEIF and not AVIF: both are in the same container, and name their brands."""
    brands = _brands(data)
    return bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS


def format_of(start: bytes) -> str | None:
    """Return the format that the first bytes of a file name, one of FORMATS but BMP and PPM; None if there is none."""
    if is_heif(start):
        return "HEIF"
    if _brands(start) & _AVIF_BRANDS:
        return "AVIF"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of a file of the ISO base media format, which HEIF and AVIF are."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
