"""WebDataset shards: which files, what is in them, and one member by its offset.

The order of training is singer's own, so members are read by position, not streamed. Only the members named here
are ever read, and none is unpickled.
"""

import glob
import hashlib
import io
import os
import resource
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1
# Larger images are refused before they are decoded: a few bytes can ask for gigabytes.
MAX_PIXELS = 100_000_000
# Enough for the size of nearly every image.
_HEADER_BYTES = 1 << 16
_OTHER_FILES = 256


@dataclass(frozen=True)
class Images:
    """Where every image of some shards is: parallel columns in the order of shards and members.

    paths, shard_sizes: the shards and their sizes in bytes; keys: names; labels: int64, NO_LABEL where there is none;
    shard: index into paths; offset, size: of the encoded image within its shard, in bytes.
    """

    paths: tuple[Path, ...]
    shard_sizes: tuple[int, ...]
    keys: tuple[str, ...]
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def content_hash(self) -> str:
        """SHA-256 over keys, labels and places of all images; the bytes of pixels are not read."""
        digest = hashlib.sha256()
        digest.update("\0".join([p.name for p in self.paths] + list(self.keys)).encode())
        for column in (self.labels, self.shard, self.offset, self.size):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
        return digest.hexdigest()


def expand_shards(spec: str | Sequence[str]) -> list[Path]:
    """The shard files that globs, brace ranges (`train-{0000..0004}.tar`) or names stand for, in order.

    Raises ValueError if one stands for nothing, or a file is missing.
    """
    paths: list[Path] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        for name in expand_urls(os.fspath(pattern)):
            if glob.has_magic(name) and not Path(name).is_file():
                found = sorted(Path(p) for p in glob.glob(name))  # noqa: PTH207 (absolute patterns too)
                if not found:
                    raise ValueError(f"no shard matches {name!r}")
                paths += found
            else:
                paths.append(Path(name))
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise ValueError(
            f"shard {missing[0]} does not exist" + (f" (nor {len(missing) - 1} more)" * (len(missing) > 1))
        )
    if not paths:
        raise ValueError("no shards given")
    if len(set(paths)) < len(paths):
        raise ValueError(f"shard {next(p for p in paths if paths.count(p) > 1)} is given twice")
    return paths


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def index_shards(spec: str | Sequence[str]) -> Images:
    """List the images of shards from the tar headers.

    Raises ValueError naming the shard for broken tars, duplicate keys, and samples without an image or with a label
    that is no integer.
    """
    paths = expand_shards(spec)
    keys: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    seen: set[str] = set()
    for number, path in enumerate(paths):
        try:
            with tarfile.open(path, "r:") as tar, path.open("rb") as file:
                for sample in _samples(tar):
                    image = next((sample.members[e] for e in IMAGE_EXTENSIONS if e in sample.members), None)
                    if image is None:
                        raise ValueError(f"{path}: sample {sample.key!r} has no {'/'.join(IMAGE_EXTENSIONS)}")
                    if sample.key in seen:
                        raise ValueError(f"{path}: key {sample.key!r} occurs twice")
                    seen.add(sample.key)
                    keys.append(sample.key)
                    rows.append((_label(file, sample, path), number, *image))
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no readable tar: {error}") from None
    if not rows:
        raise ValueError(f"no images in {len(paths)} shards, the first of them {paths[0]}")
    labels, shard, offset, size = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
    sizes = tuple(p.stat().st_size for p in paths)
    return Images(tuple(p.resolve() for p in paths), sizes, tuple(keys), labels, shard, offset, size)


class ImageFile:
    """Reads images of `Images` by number; safe to share between threads, opens a shard once."""

    def __init__(self, images: Images) -> None:
        self.images = images
        _allow_open_files(len(images.paths))
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}

    def read(self, number: int) -> Image.Image:
        """Image `number`, RGB. Raises ValueError naming key and shard if it cannot be decoded."""
        data, where = self._encoded(number)
        with _decoding(where):
            return to_rgb(open_image(data, where))

    def dimensions(self, number: int) -> tuple[int, int]:
        """(width, height) of image `number`, from its header."""
        try:
            data, where = self._encoded(number, _HEADER_BYTES)
            return open_image(data, where).size
        except (OSError, SyntaxError):  # a long header, or no image at all
            data, where = self._encoded(number)
            with _decoding(where):
                return open_image(data, where).size

    def _encoded(self, number: int, most: int | None = None) -> tuple[bytes, str]:
        shard = int(self.images.shard[number])
        where = f"image {self.images.keys[number]!r} in {self.images.paths[shard]}"
        size, offset = int(self.images.size[number]), int(self.images.offset[number])
        size = size if most is None else min(size, most)
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) < size:
            raise ValueError(f"{where}: the shard ends {size - len(data)} bytes too early")
        return data, where

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = os.open(self.images.paths[shard], os.O_RDONLY)
                except OSError as error:
                    raise ValueError(f"shard {self.images.paths[shard]}: {error.strerror}") from None
            return self._files[shard]

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image(data: bytes, where: str, formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")) -> Image.Image:
    """An image of a known kind and sane size, not yet decoded."""
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{where}: {image.width} x {image.height} pixels are too many")
    return image


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; 16-bit greys are scaled to 8 bits, transparency is laid on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _samples(tar: tarfile.TarFile) -> Iterator[_Sample]:
    """Consecutive members with one key form a sample, as in the webdataset library."""
    current: _Sample | None = None
    for member in tar:
        key, extension = base_plus_ext(member.name)
        if not member.isreg() or key is None:
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key)
        current.members[extension.lower()] = (member.offset_data, member.size)
    if current is not None:
        yield current


def _label(file: io.BufferedReader, sample: _Sample, path: Path) -> int:
    if "cls" not in sample.members:
        return NO_LABEL
    offset, size = sample.members["cls"]
    file.seek(offset)
    text = file.read(min(size, 32))
    try:
        label = int(text)
    except ValueError:
        label = NO_LABEL
    if not 0 <= label < 2**31:
        raise ValueError(f"{path}: label of {sample.key!r} is no class number: {text[:20]!r}")
    return label


def require_labels(images: Images, what: str) -> None:
    missing = np.flatnonzero(images.labels == NO_LABEL)
    if len(missing):
        raise ValueError(
            f"{what}: {len(missing)} of {len(images)} images have no .cls label, the first is "
            f"{images.keys[int(missing[0])]!r}"
        )


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files to what `count` shards need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(f"{count} shards are more than the {hard} files that this system lets a process open")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
