"""Small image files of every kind: made here, byte by byte where Pillow cannot write them."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

# Four flat quarters, so that what a lossy format changes is far from their middles.
COLOURS = np.array([[(200, 40, 40), (40, 200, 40)], [(40, 40, 200), (220, 220, 60)]], np.uint8)
PICTURE = COLOURS.repeat(16, 0).repeat(24, 1)  # (32, 48, 3)
GREY = np.array([[0, 64], [128, 255]], np.uint8).repeat(16, 0).repeat(24, 1)
# 16 bits whose lower halves say nothing about the upper ones.
DEEP = (GREY.astype(np.uint16) << 8) + 77


class Case(NamedTuple):
    """A file. holds, read: the words of its row; data: makes it; expected: pixels, or words of the refusal."""

    format: str
    holds: str
    read: str
    data: Callable[[], bytes]
    expected: np.ndarray | str
    near: int = 0


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def other() -> Image.Image:
    """A frame after the first, which must not be read."""
    return Image.fromarray(255 - PICTURE)


def clear() -> Image.Image:
    """The right half is transparent black."""
    image = picture("RGBA")
    image.paste((0, 0, 0, 0), (24, 0, 48, 32))
    return image


CLEARED = PICTURE.copy()
CLEARED[:, 24:] = 255


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: np.ndarray, bits: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of rows of samples, (H, W) or (H, W, C). before, after: chunks around the pixels."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        wide = [np.unpackbits(row[:, None].astype(np.uint8), axis=1)[:, 8 - bits :] for row in rows]
        packed = [np.packbits(row.ravel()).tobytes() for row in wide]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + body + after + chunk(b"IEND", b"")


def tiff(values: np.ndarray, photometric: int = 1, order: str = "<", **tags: int) -> bytes:
    """A TIFF of one strip, (H, W) or (H, W, C), without compression. tags: t274=6 and the like."""
    height, width, *channels = values.shape
    count, bits = (channels or [1])[0], values.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: count, 278: height}
    entries |= {279: len(data), 339: kind} | {int(name[1:]): value for name, value in tags.items()}
    directory = struct.pack(f"{order}H", len(entries))
    extra, at = b"", 8 + len(data) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        if tag in (258, 339) and count > 1:
            directory += struct.pack(f"{order}HHII", tag, 3, count, at + len(extra))
            extra += struct.pack(f"{order}{count}H", *[value] * count)
        else:
            directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + directory + bytes(4) + extra


def heic(image: Image.Image, *others: Image.Image, **options: Any) -> bytes:
    assert pillow_heif is not None
    pillow_heif.register_heif_opener()
    return saved(image, "HEIF", quality=95, save_all=bool(others), append_images=list(others), **options)


def pgm(values: np.ndarray, most: int) -> bytes:
    return f"P5 {values.shape[1]} {values.shape[0]} {most}\n".encode() + values.tobytes()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def twelve() -> bytes:
    """12 bits a sample, two samples in three bytes."""
    flat = (DEEP >> 4).ravel()
    a, b = flat[::2], flat[1::2]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)
    return tiff(packed.reshape(32, 72), t256=48, t258=12)


def lab() -> Image.Image:
    from PIL import ImageCms

    to = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    found = ImageCms.applyTransform(picture(), to)
    assert found is not None
    return found


def palette() -> Image.Image:
    return picture().quantize(16)


def cmyk() -> Image.Image:
    return picture("CMYK")


def bilevel() -> Image.Image:
    return Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)


def file(kind: str, image: Callable[[], Image.Image] = picture, **options: Any) -> Callable[[], bytes]:
    return lambda: saved(image(), kind, **options)


def frames(kind: str, image: Callable[[], Image.Image] = picture, **options: Any) -> Callable[[], bytes]:
    """Two frames, of which the second must not be read."""
    return lambda: saved(image(), kind, save_all=True, append_images=[other().convert(image().mode)], **options)


def keyed() -> bytes:
    """A palette, whose first colour, black, is transparent."""
    alpha = bytes([0]) + bytes([255]) * 255
    return saved(Image.fromarray(GREY).convert("P"), "PNG", transparency=alpha)


AS_IS, SCALED, UPPER, WHITE, FIRST = "as it is", "scaled to 8 bits", "the upper 8 bits", "on white", "the first frame"
PILLOWS = "RGB by Pillow's formula, without a profile"
INTEGERS, FLOATS = "integers of 32 bits", GREY.astype(np.float32) / 255
LEVELS = np.arange(4, dtype=np.uint8).repeat(12)[None].repeat(32, 0)
WIDE, DEEP_RGB = DEEP.astype(np.int32), (PICTURE.astype(np.uint16) << 8) + 77
BLACK_AND_WHITE = np.where(GREY > 127, 255, 0).astype(np.uint8)
KEYED = np.where(three(GREY) == 0, 255, three(GREY)).astype(np.uint8)
CASES = [
    Case("JPEG", "RGB", AS_IS, file("JPEG"), PICTURE, 12),
    Case("JPEG", "grey", AS_IS, file("JPEG", lambda: Image.fromarray(GREY)), three(GREY), 12),
    Case("JPEG", "CMYK", PILLOWS, file("JPEG", cmyk), PICTURE, 12),
    Case("JPEG", "several pictures (MPO)", FIRST, frames("MPO"), PICTURE, 12),
    Case("PNG", "RGB of 8 bits", AS_IS, file("PNG"), PICTURE),
    Case("PNG", "RGB of 16 bits", UPPER, lambda: png(DEEP_RGB, 16, 2), PICTURE),
    Case("PNG", "grey of 1 bit", SCALED, lambda: png(LEVELS & 1, 1, 0), three((LEVELS & 1) * 255)),
    Case("PNG", "grey of 2 bits", SCALED, lambda: png(LEVELS, 2, 0), three(LEVELS * 85)),
    Case("PNG", "grey of 4 bits", SCALED, lambda: png(LEVELS * 5, 4, 0), three(LEVELS * 85)),
    Case("PNG", "grey of 8 bits", AS_IS, lambda: png(GREY, 8, 0), three(GREY)),
    Case("PNG", "grey of 16 bits", UPPER, lambda: png(DEEP, 16, 0), three(GREY)),
    Case("PNG", "palette", AS_IS, file("PNG", palette), PICTURE, 4),
    Case("PNG", "palette with transparent colours", WHITE, keyed, KEYED),
    Case("PNG", "alpha", WHITE, file("PNG", clear), CLEARED),
    Case("PNG", "an animation (APNG)", FIRST, frames("PNG"), PICTURE),
    Case("WEBP", "RGB", AS_IS, file("WEBP", lossless=True), PICTURE),
    Case("WEBP", "alpha", WHITE, file("WEBP", clear, lossless=True), CLEARED),
    Case("WEBP", "an animation", FIRST, frames("WEBP", lossless=True), PICTURE),
    Case("AVIF", "RGB", AS_IS, file("AVIF", quality=95), PICTURE, 12),
    Case("AVIF", "alpha", WHITE, file("AVIF", clear, quality=95), CLEARED, 12),
    Case("AVIF", "an animation", FIRST, frames("AVIF", quality=95), PICTURE, 12),
    Case("HEIF", "RGB", AS_IS, lambda: heic(picture()), PICTURE, 12),
    Case("HEIF", "several images", "the primary one", lambda: heic(picture(), other()), PICTURE, 12),
    Case("JPEG2000", "RGB", AS_IS, file("JPEG2000"), PICTURE, 1),
    Case("JPEG2000", "grey of 16 bits", UPPER, file("JPEG2000", lambda: Image.fromarray(DEEP)), three(GREY), 1),
    Case("JPEG2000", "alpha", WHITE, file("JPEG2000", clear), CLEARED, 1),
    Case("TIFF", "RGB of 8 bits", AS_IS, lambda: tiff(PICTURE, 2), PICTURE),
    Case("TIFF", "RGB of 16 bits", UPPER, lambda: tiff(DEEP_RGB, 2), PICTURE),
    Case("TIFF", "1 bit", SCALED, file("TIFF", bilevel, compression="group4"), three(BLACK_AND_WHITE)),
    Case("TIFF", "grey of 8 bits", AS_IS, lambda: tiff(GREY), three(GREY)),
    Case("TIFF", "grey of 12 bits", UPPER, twelve, three(GREY)),
    Case("TIFF", "grey of 16 bits", UPPER, lambda: tiff(DEEP), three(GREY)),
    Case("TIFF", "grey of 16 bits, big-endian", UPPER, lambda: tiff(DEEP, order=">"), three(GREY)),
    Case("TIFF", "grey of 16 bits, 0 is white", f"{UPPER}, inverted", lambda: tiff(0xFFFF - DEEP, 0), three(GREY)),
    Case(
        "TIFF",
        "16 bits with a sign, if one is negative",
        "refused",
        lambda: tiff(GREY.astype("i2") - 1),
        "from -1 to 254",
    ),
    Case("TIFF", "8 bits with a sign, if one is negative", "refused", lambda: tiff(GREY.astype("i1")), "have a sign"),
    Case("TIFF", f"{INTEGERS} within 0 to 255", AS_IS, lambda: tiff(GREY.astype(np.int32)), three(GREY)),
    Case("TIFF", f"{INTEGERS} within 0 to 65535", f"{UPPER} of 16", lambda: tiff(WIDE), three(GREY)),
    Case("TIFF", f"other {INTEGERS}", "refused", lambda: tiff(WIDE + 1000), "its integers are from 1077 to 66357"),
    Case("TIFF", "floats within 0 to 1", "times 255", lambda: tiff(FLOATS), three(GREY)),
    Case("TIFF", "floats within 0 to 1, 0 is white", "times 255, inverted", lambda: tiff(1 - FLOATS, 0), three(GREY)),
    Case("TIFF", "other floats", "refused", lambda: tiff(FLOATS * 3 - 1), "its floats are from -1 to 2"),
    Case("TIFF", "palette", AS_IS, file("TIFF", palette), PICTURE, 4),
    Case("TIFF", "CMYK", PILLOWS, file("TIFF", cmyk), PICTURE),
    Case("TIFF", "Lab", "converted to sRGB", file("TIFF", lab), PICTURE, 6),
    Case("TIFF", "alpha", WHITE, file("TIFF", clear), CLEARED),
    Case("TIFF", "several pages", "the first page", frames("TIFF"), PICTURE),
    Case("TIFF", "more channels", "refused", lambda: tiff(np.dstack([PICTURE] * 2)), "cannot identify image file"),
    Case("BMP", "RGB", AS_IS, file("BMP"), PICTURE),
    Case("BMP", "1 bit", SCALED, file("BMP", bilevel), three(BLACK_AND_WHITE)),
    Case("GIF", "palette", AS_IS, file("GIF", palette), PICTURE, 4),
    Case("GIF", "an animation", FIRST, frames("GIF", palette), PICTURE, 4),
    Case("PPM", "RGB of 8 bits", AS_IS, file("PPM"), PICTURE),
    Case("PPM", "grey of 16 bits (PGM)", UPPER, lambda: pgm(DEEP.astype(">u2"), 65535), three(GREY)),
    Case("PPM", "grey of another maximum (PGM)", SCALED, lambda: pgm(LEVELS, 3), three(LEVELS * 85)),
]
