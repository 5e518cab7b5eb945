"""WebDataset shards: which files, what is in them, and one member by its offset.

The order of training is singer's own, so members are read by position, not streamed. Only the members named here
are ever read, and none is unpickled. Archives are taken for hostile: a defect is named or listed, never passed over.
"""

import glob
import hashlib
import io
import os
import threading
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

import numpy as np
from PIL import Image, UnidentifiedImageError
from webdataset.shardlists import expand_urls

from pipeline.prefetch import prefetch
from pipeline.progress import meter
from pipeline.stores import allow_open_files
from pipeline.tars import NO_LABEL, UNSAFE, Defect, contents, read_samples

OnError = Literal["fail", "skip"]

# Larger images are refused before they are decoded: a few bytes can ask for gigabytes.
MAX_PIXELS = 100_000_000
# Enough for the size of nearly every image.
_HEADER_BYTES = 1 << 16
_FORMATS = ("JPEG", "PNG", "WEBP")
_SURVEY_BATCH = 64


class Keys(Sequence[str]):
    """Names of images, decoded when asked for: a million take little more than their letters.

    text: uint8, the UTF-8 bytes of all keys one after the other; ends: int64, where each key ends in text.
    Raises ValueError if these do not fit each other.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        if np.any(np.diff(ends, prepend=0) < 0) or (int(ends[-1]) if len(ends) else 0) != len(text):
            raise ValueError(f"the ends of {len(ends)} keys do not divide their {len(text)} bytes")
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        text, ends = bytearray(), array("q")
        for key in keys:
            text += key.encode()
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...
    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        numbers = range(len(self))[item]  # settles negative numbers, steps and IndexError
        if isinstance(numbers, range):
            return tuple(self[number] for number in numbers)
        start = int(self.ends[numbers - 1]) if numbers else 0
        return self.text[start : int(self.ends[numbers])].tobytes().decode()


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, or (key "") the unreadable rest of a shard. shard: file name."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}' {self.reason}" if self.key else f"{self.shard} {self.reason}"


@dataclass(frozen=True)
class Images:
    """Where every image of some shards is: parallel columns in the order of shards and members.

    paths, shard_sizes: the shards and their sizes in bytes; keys: names; labels: int32, NO_LABEL where there is none;
    shard: int32, index into paths; offset, size: int64, of the encoded image within its shard, in bytes; skipped:
    what the shards hold besides and was left out.
    """

    paths: tuple[Path, ...]
    shard_sizes: tuple[int, ...]
    keys: Keys
    labels: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: np.ndarray) -> "Images":
        """Some of the images, in the order of `rows`."""
        columns = {name: getattr(self, name)[rows] for name in ("labels", "shard", "offset", "size")}
        return replace(self, keys=Keys.of(self.keys[i] for i in rows.tolist()), **columns)

    def place_hash(self) -> str:
        """SHA-256 over keys, labels and places of all images; the bytes of pixels are not read.

        Version 1 of the cache format names its images by it.
        """
        digest = hashlib.sha256()
        digest.update("\0".join([*(p.name for p in self.paths), *self.keys]).encode())
        for column in (self.labels, self.shard, self.offset, self.size):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Survey:
    """What reading all images tells. digest: uint64, see content_hash; width, height: int32, pixels."""

    images: Images
    digest: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def select(self, rows: np.ndarray) -> "Survey":
        """Some of the images, in the order of `rows`."""
        return Survey(self.images.select(rows), self.digest[rows], self.width[rows], self.height[rows])


def image_digest(data: bytes) -> int:
    """The first 8 bytes (little-endian) of the SHA-256 of an encoded image."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def content_hash(images: Images, digest: np.ndarray) -> str:
    """SHA-256 over keys, labels and digests of all images: the same wherever they lie, whatever shards they are in.

    digest: (n,) uint64, the first 8 bytes (little-endian) of the SHA-256 of every encoded image.
    """
    assert len(digest) == len(images)
    whole = hashlib.sha256("\0".join(images.keys).encode())
    whole.update(images.labels.astype("<i4").tobytes())
    whole.update(digest.astype("<u8").tobytes())
    return whole.hexdigest()


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
class _Defects:
    """Raises the first defect, or lists all."""

    on_error: OnError
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, path: Path, key: str, reason: str) -> None:
        # What is raised or listed gets printed and stored.
        key = key.encode("unicode_escape").decode() if UNSAFE.search(key) else key
        if self.on_error == "fail":
            where = Skipped(str(path), key, reason)
            raise ValueError(f"{where}; repair it, or cache without it (cache.on_error=skip)")
        self.skipped.append(Skipped(path.name, key, reason))


def index_shards(spec: str | Sequence[str], on_error: OnError = "fail") -> Images:
    """List the images of shards from the tar headers.

    A defect is a damaged archive or an unusable sample: without an image, an empty image, a label that is no class
    number, a link in place of a file, a key that occurs twice (the first one counts) or is unsafe as a path. Of a
    damaged shard the samples before the damage stay, without the last, which may have lost members. As in the
    webdataset library, files whose names have no extension or begin with a dot belong to no sample.

    Raises ValueError for a shard that is missing, if there are no images at all, and, unless on_error is "skip", for
    the first defect; else defects are listed in `skipped`.
    """
    paths = expand_shards(spec)
    defects = _Defects(on_error)
    keys: list[str] = []
    labels, shard, offset, size = array("i"), array("i"), array("q"), array("q")
    seen: set[str] = set()
    for number, path in enumerate(paths):
        samples, damage = read_samples(path)
        if damage is not None:
            defects.add(path, "", damage)
        for sample in samples:
            for extension in sample.repeated:
                defects.add(path, sample.key, f"has two members .{extension}")
            try:
                label, image = contents(sample)
                if sample.key in seen:
                    raise Defect("occurs twice")
            except Defect as defect:
                defects.add(path, sample.key, str(defect))
            else:
                keys.append(sample.key)
                labels.append(label)
                shard.append(number)
                offset.append(image.offset)
                size.append(image.size)
            seen.add(sample.key)
    if not keys:
        also = f"; the first defect: {defects.skipped[0]}" if defects.skipped else ""
        raise ValueError(f"no images in {len(paths)} shards, the first of them {paths[0]}{also}")
    return Images(
        tuple(p.resolve() for p in paths),
        tuple(p.stat().st_size for p in paths),
        Keys.of(keys),
        np.array(labels, dtype=np.int32),
        np.array(shard, dtype=np.int32),
        np.array(offset, dtype=np.int64),
        np.array(size, dtype=np.int64),
        tuple(defects.skipped),
    )


def index_beside(images: Images, extension: str) -> Images:
    """The members .{extension} beside the images: the same rows, with the places and sizes of these members.

    Raises ValueError naming shard and key where one is missing, empty, no regular file or there twice.
    """
    offset, size = np.zeros_like(images.offset), np.zeros_like(images.size)
    for number, path in enumerate(images.paths):
        samples = {sample.key: sample for sample in read_samples(path, extension)[0]}
        for row in np.flatnonzero(images.shard == number).tolist():
            sample = samples.get(images.keys[row])
            member = None if sample is None else sample.members.get(extension)
            if sample is None or member is None:
                reason = f"has no .{extension}; every image needs one here"
            elif extension in sample.repeated:
                reason = f"has two members .{extension}; remove one"
            elif not member.regular or not member.size:
                reason = f"has a .{extension} that is {'empty' if member.regular else 'no regular file'}; replace it"
            else:
                offset[row], size[row] = member.offset, member.size
                continue
            raise ValueError(str(Skipped(str(path), images.keys[row], reason)))
    return replace(images, offset=offset, size=size)


def survey(images: Images, workers: int, on_error: OnError) -> Survey:
    """Read every image once, in threads: its digest and size, and whether it can be decoded.

    Raises ValueError for the first defective image, or, if on_error is "skip", leaves the defective ones out of the
    images and lists them in their `skipped`; raises ValueError if none is left.
    """
    defects = _Defects(on_error)
    columns = np.zeros(len(images), dtype=[("digest", np.uint64), ("width", np.int32), ("height", np.int32)])
    good = np.ones(len(images), dtype=np.bool_)
    batches = [range(i, min(i + _SURVEY_BATCH, len(images))) for i in range(0, len(images), _SURVEY_BATCH)]
    # The filters belong to the process, so they are set here and not in the threads. What PIL grumbles about is of no
    # use to the user, except that it finds an image suspiciously large.
    with ImageFile(images) as files, meter("index", len(images), "images") as m, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        inspected = prefetch(lambda numbers: [_inspect(files, i) for i in numbers], batches, workers, m)
        for numbers, batch in zip(batches, inspected, strict=True):
            for number, facts in zip(numbers, batch, strict=True):
                if isinstance(facts, str):
                    good[number] = False
                    defects.add(images.paths[int(images.shard[number])], images.keys[number], facts)
                else:
                    columns[number] = facts
            m.advance(len(numbers))
    if not good.any():
        raise ValueError(f"none of {len(images)} images can be decoded; the first: {defects.skipped[0]}")
    images = replace(images, skipped=(*images.skipped, *defects.skipped))
    found = Survey(images, *(np.ascontiguousarray(columns[name]) for name in ("digest", "width", "height")))
    return found if good.all() else found.select(np.flatnonzero(good))


def _inspect(files: "ImageFile", number: int) -> tuple[int, int, int] | str:
    """(digest, width, height) of an image, or why it is defective."""
    try:
        data, _ = files.encoded(number)
        image = _open(data)
        width, height = image.size
        # libjpeg then reads all of the data, but computes few pixels; the other formats are decoded in full.
        image.draft("RGB", (1, 1))
        image.load()
    except Exception as error:  # decoders raise whatever broken data makes them stumble over
        return f"cannot be decoded: {_line(error)}"
    return image_digest(data), width, height


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ImageFile:
    """Reads images of `Images` by number; safe to share between threads, opens a shard once.

    what: the word for them in messages.
    """

    def __init__(self, images: Images, what: str = "image") -> None:
        self.images, self.what = images, what
        allow_open_files(len(images.paths))
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}

    def read(self, number: int) -> Image.Image:
        """Image `number`, RGB. Raises ValueError naming key and shard if it cannot be decoded."""
        data, where = self.encoded(number)
        with _decoding(where):
            return to_rgb(_open(data))

    def dimensions(self, number: int) -> tuple[int, int]:
        """(width, height) of image `number`, from its header."""
        try:
            return _open(self.encoded(number, _HEADER_BYTES)[0]).size
        except Exception:  # a long header, or no image at all
            data, where = self.encoded(number)
            with _decoding(where):
                return _open(data).size

    def encoded(self, number: int, most: int | None = None) -> tuple[bytes, str]:
        """The bytes of image `number` (the first `most`), and its key and shard for messages.

        Raises ValueError if they cannot be read.
        """
        shard = int(self.images.shard[number])
        where = f"{self.what} {self.images.keys[number]!r} in {self.images.paths[shard]}"
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


def open_image(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """An image of a known kind and sane size, not yet decoded.

    Raises ValueError if it is too large, OSError or SyntaxError if it is no such image.
    """
    try:
        return _open(data, formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error}") from None


def decode(data: bytes, where: str, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """An image as it is stored, in whatever mode. Raises ValueError beginning with `where` if it cannot be decoded."""
    with _decoding(where):
        image = _open(data, formats)
        image.load()
        return image


def _open(data: bytes, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        # PIL's own message names an address in memory: other words in every run.
        raise UnidentifiedImageError(f"cannot identify image file as {', '.join(formats)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
    return image


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise whatever broken data makes them stumble over
        raise ValueError(f"{where} cannot be decoded: {_line(error)}") from None


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


def relocate(images: Images, shards: str | Sequence[str] | None) -> Images:
    """The images with their shards where they lie now. Raises ValueError if one is missing or has changed."""
    paths = images.paths
    if shards is not None:
        given = expand_shards(shards)
        found = {p.name: p.resolve() for p in given}
        if len(found) == len(given):
            missing = [p.name for p in paths if p.name not in found]
            if missing:
                raise ValueError(f"--shards does not give {missing[0]}, which the cache was made from")
            paths = tuple(found[p.name] for p in paths)
        elif len(given) == len(paths):  # names repeat: by order
            paths = tuple(p.resolve() for p in given)
        else:
            raise ValueError(f"--shards gives {len(given)} shards with repeated names; the cache has {len(paths)}")
    for path, size in zip(paths, images.shard_sizes, strict=True):
        if not path.is_file():
            raise ValueError(f"shard {path} of the cache is gone; if it has moved, give its place with --shards")
        if path.stat().st_size != size:
            raise ValueError(f"shard {path} has changed since it was cached; cache it again")
    return replace(images, paths=paths)


def require_labels(images: Images, what: str) -> None:
    missing = np.flatnonzero(images.labels == NO_LABEL)
    if len(missing):
        raise ValueError(
            f"{what}: {len(missing)} of {len(images)} images have no .cls label, the first is "
            f"{images.keys[int(missing[0])]!r}"
        )
