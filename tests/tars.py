"""Tars of the tests, sound and forged, and small images to put into them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from conftest import seeded
from files import saved
from mutate import headers
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

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


def sound_tar(path: Path) -> bytes:
    write_tar(path, {f"{n}.{e}": d for n in "abc" for e, d in (("png", png((64, 64))), ("cls", b"7"))})
    return path.read_bytes()
