"""What lies where in a cache. docs/cache-format.md is normative; where this file differs, this file is wrong."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict

from pipeline.cache.codecs import CODECS, Fixed, Layout
from pipeline.data import Images, Keys, Skipped
from pipeline.data.views import View
from pipeline.storage import Store
from pipeline.storage.outputs import is_sealed, json_bytes, read_json, sealed, validated
from singer.errors import UserError

FORMAT = "singer-feature-cache"
VERSION = 3

MANIFEST = "manifest.json"
IMAGES = "images.safetensors"
RECORDS = "records.safetensors"
COMPLETE = "complete.json"
# Version 2 had it in place of these three.
INDEX = "index.safetensors"
TAIL = "tail.safetensors"
CALIBRATION = "calibration.safetensors"
FIDELITY = "fidelity.json"
SKIPPED = "skipped.json"
JOURNAL = "journal"
FEATURES = "features"
POSITIONS = "positions"
PIXELS = "pixels"
VIEWS = "views"
PARTS = "parts"
_NO_CHANGE = np.array([1, 1, 1, 0], dtype=np.float32)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherManifest(_Section):
    """The teacher and its preprocessing. weights: SHA-256 (models.weight_hash)."""

    name: str
    architecture: str
    model_args: dict[str, Any]
    weights: str
    depth: int
    width: int
    prefix_tokens: int
    class_token: bool
    grid: tuple[int, int]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, Any]:
        """All but the name, which may be a path: the weights say which teacher it is."""
        return self.model_dump(mode="json", exclude={"name"})

    def digest(self) -> str:
        """SHA-256 of the identity."""
        return hashlib.sha256(canonical(self.identity()).encode()).hexdigest()

    @property
    def variant(self) -> str:
        """The short name of this teacher as it was run, such as vit_tiny_patch16_224@0a1b2c3d."""
        return f"{self.architecture}@{self.digest()[:8]}"


class DataManifest(_Section):
    """The images that the shards list. hash: shards.listing_hash; in version 2, of keys, labels and encoded bytes."""

    shards: tuple[str, ...]
    images: int
    labelled: int
    hash: str


class PixelsManifest(_Section):
    """Stored views: their side in pixels, and for JPEG the quality."""

    kind: Literal["jpeg", "uint8"]
    size: int
    quality: int | None


class Manifest(_Section):
    """All that defines a part of a cache. Written once, before any image is read.

    views: how views are drawn, with `first` and `count` for their numbers; stored_patches: patch tokens a record;
    records: the views of all listed images; files: SHA-256 of the small files beside it.
    """

    format: Literal["singer-feature-cache"] = "singer-feature-cache"
    version: Literal[2, 3] = 3
    teacher: TeacherManifest
    data: DataManifest
    views: dict[str, Any]
    blocks: tuple[int, ...]
    codec: str
    stored_patches: int
    lossless: Literal["none", "zstd", "blosc"]
    pixels: PixelsManifest | None
    records: int
    shard_records: int
    tail_first_block: int
    files: dict[str, str] = {}

    @property
    def tokens(self) -> int:
        """Stored tokens a record."""
        return self.teacher.prefix_tokens + self.stored_patches

    @property
    def sampled(self) -> bool:
        return self.stored_patches < self.teacher.patches

    @property
    def shards(self) -> int:
        """Number of Zarr shards of each array."""
        return -(-self.records // self.shard_records)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First record of a shard and the one behind its last."""
        return shard * self.shard_records, min(self.records, (shard + 1) * self.shard_records)

    def layout(self, block: int) -> Layout:
        """{part: form} of a block's arrays."""
        return CODECS[self.codec].parts(self.tokens, self.teacher.width)

    def arrays(self) -> Layout:
        """{name: form of one record} of all arrays."""
        arrays: Layout = {f"{FEATURES}/{b}/{part}": form for b in self.blocks for part, form in self.layout(b).items()}
        if self.sampled:
            arrays[POSITIONS] = Fixed((self.stored_patches,), "int16")
        if self.pixels is not None:
            size = self.pixels.size
            arrays[PIXELS] = Fixed((size, size, 3), "uint8") if self.pixels.kind == "uint8" else None
        if self.version >= 3:
            arrays[VIEWS] = Fixed((self.view_form.itemsize,), "uint8")
        return arrays

    @property
    def view_form(self) -> np.dtype[np.void]:
        return view_form(any(self.views["color"]))

    @property
    def views_each(self) -> int:
        """Records an image."""
        return int(self.views["count"])

    def compression(self, array: str) -> str:
        """Only features are compressed, and of these only the parts of one size."""
        return self.lossless if array.startswith(FEATURES) and self.arrays()[array] is not None else "none"

    def rows(self) -> str:
        """Which listed images and views: equal for parts of whole images that hold other blocks of the same records."""
        return canonical([self.data.hash, self.views])

    def identity(self) -> dict[str, Any]:
        """What a cache must agree in to be the same: all but names and places."""
        value = self.model_dump(mode="json", exclude={"files"})
        value["teacher"] = self.teacher.identity()
        del value["data"]["shards"]
        return value

    def id(self) -> str:
        """SHA-256 of the identity: the name by which the journal refers to the part."""
        return hashlib.sha256(canonical(self.identity()).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        return json_bytes(sealed(self.model_dump(mode="json")))


def view_form(color: bool) -> np.dtype[np.void]:
    """The bytes of a record in the array `views`: what was found when its image was read, and its view."""
    fields: list[Any] = [("digest", "<u8"), ("width", "<i4"), ("height", "<i4"), ("box", "<f4", 4), ("flip", "?")]
    return np.dtype(fields + [("color", "<f4", 4)] * color)


class Completion(_Section):
    """What is known of a part once all its shards are done. Written last; without it the part is not complete.

    part: the manifest's id; hash: shards.content_hash of the images that can be decoded; images, labelled, records:
    how many of these there are; unreadable: numbers of the others among the listed ones; skipped: all that is left out,
    as skipped.json lists it; files: SHA-256 of the small files that are written now; arrays: {name: [bytes, SHA-256] of
    each shard's file}.
    """

    part: str
    hash: str
    images: int
    labelled: int
    records: int
    unreadable: tuple[int, ...]
    skipped: int
    files: dict[str, str]
    arrays: dict[str, list[tuple[int, str]]]

    def to_bytes(self) -> bytes:
        return json_bytes(sealed(self.model_dump(mode="json")))


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_manifest(store: Store) -> Manifest:
    """Raises UserError if there is no cache of a known version in the store."""
    value = read_json(store, MANIFEST, "feature cache")
    file = f"{store.url}/{MANIFEST}"
    if value.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a singer feature cache")
    if value.get("version") not in (2, VERSION):
        raise UserError(f"{store.url} has cache format version {value.get('version')}; this singer reads 2 and 3")
    if not is_sealed(value):
        raise UserError(f"{file} is damaged: it does not match its own checksum")
    del value["sha256"]
    manifest = validated(value, Manifest, file)
    if manifest.codec not in CODECS:
        raise UserError(f"{store.url} uses codec {manifest.codec!r}; known: {', '.join(CODECS)}")
    return manifest


@dataclass(frozen=True)
class Index:
    """Which image and view each record is, and where the image lies. Only images that can be decoded are in it.

    digest: (images,) uint64; image, view: (records,) int32; box: (records, 4) float32; flip: (records,) bool; color:
    (records, 4) float32, or None.
    """

    images: Images
    digest: np.ndarray
    image: np.ndarray
    view: np.ndarray
    box: np.ndarray
    flip: np.ndarray
    color: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image)

    def key(self, record: int) -> str:
        return self.images.keys[int(self.image[record])]

    def record_view(self, record: int) -> View:
        left, upper, right, lower = (float(v) for v in self.box[record])
        color = None
        if self.color is not None:
            brightness, contrast, saturation, hue = (float(v) for v in self.color[record])
            color = brightness, contrast, saturation, hue
        return View((left, upper, right, lower), bool(self.flip[record]), color)

    def record_bytes(self) -> bytes:
        """What records.safetensors holds: all but what is known from the listed images."""
        columns = {"image.digest": self.digest, "record.box": self.box, "record.flip": self.flip}
        return save_columns(columns | ({} if self.color is None else {"record.color": self.color}))


def number_records(images: int, first_view: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and number of the view of every record, (records,) int32 each: image by image, and view by view."""
    image = np.repeat(np.arange(images, dtype=np.int32), views)
    return image, np.tile(np.arange(first_view, first_view + views, dtype=np.int32), images)


def image_bytes(images: Images) -> bytes:
    """What images.safetensors holds: the listed images, and what the shards hold besides."""
    columns = {
        "image.key_bytes": images.keys.text,
        "image.key_end": images.keys.ends,
        "image.label": images.labels,
        "image.shard": images.shard,
        "image.offset": images.offset,
        "image.size": images.size,
        "shard.size": np.array(images.shard_sizes, dtype=np.int64),
    }
    about = {"shards": [str(p) for p in images.paths], "skipped": [vars(s) for s in images.skipped]}
    # One entry: safetensors writes several in whatever order.
    return save_columns(columns, {"listing": json.dumps(about)})


def read_images(store: Store) -> Images:
    """The images that were listed when a part was begun. Raises UserError if the file is missing or damaged."""
    with _reading(store, IMAGES) as (columns, about):
        listing = json.loads(about["listing"])
        skipped = tuple(Skipped(**entry) for entry in listing["skipped"])
        return replace(_images(columns, listing["shards"]), skipped=skipped)


def read_records(store: Store, images: Images, manifest: Manifest) -> Index:
    """The index of a complete part, whose readable images are given. Raises UserError as read_images."""
    with _reading(store, RECORDS) as (columns, _):
        image, view = number_records(len(images), manifest.views["first"], manifest.views_each)
        shapes = {columns["image.digest"].shape: (len(images),), columns["record.box"].shape: (len(image), 4)}
        if any(there != expected for there, expected in shapes.items()) or len(columns["record.flip"]) != len(image):
            raise ValueError(f"its columns are not those of {len(images)} images")
        color = columns.get("record.color")
        return Index(images, columns["image.digest"], image, view, columns["record.box"], columns["record.flip"], color)


def read_index_2(store: Store) -> Index:
    """The index of a part of version 2. Raises UserError as read_images."""
    with _reading(store, INDEX) as (columns, about):
        names = ("image.digest", "record.image", "record.view", "record.box", "record.flip")
        digest, image, view, box, flip = (columns[name] for name in names)
        return Index(
            _images(columns, json.loads(about["shards"])), digest, image, view, box, flip, columns.get("record.color")
        )


def content_hash_2(images: Images, digest: np.ndarray) -> str:
    """`data.hash` of version 2: SHA-256 over keys, with NUL between them, labels and digests."""
    whole = hashlib.sha256("\0".join(images.keys).encode())
    whole.update(images.labels.astype("<i4").tobytes())
    whole.update(digest.astype("<u8").tobytes())
    return whole.hexdigest()


def _images(columns: Mapping[str, np.ndarray], shards: Sequence[str]) -> Images:
    return Images(
        paths=tuple(map(Path, shards)),
        shard_sizes=tuple(columns["shard.size"].tolist()),
        keys=Keys(columns["image.key_bytes"], columns["image.key_end"]),
        labels=columns["image.label"],
        shard=columns["image.shard"],
        offset=columns["image.offset"],
        size=columns["image.size"],
    )


def save_columns(columns: Mapping[str, np.ndarray], about: dict[str, str] | None = None) -> bytes:
    """A safetensors file of some arrays."""
    # safetensors writes the memory of an array, whatever its strides.
    rows = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    data: bytes = safetensors.numpy.save(rows, metadata=about)
    return data


@contextmanager
def _reading(store: Store, name: str) -> Iterator[tuple[dict[str, np.ndarray], dict[str, str]]]:
    """The arrays of a safetensors file and its metadata; whatever is wrong with them is a UserError."""
    file = f"{store.url}/{name}"
    try:
        data = store.read(name)
        columns = safetensors.numpy.load(data)
        yield columns, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def join(indices: Iterable[Index]) -> Index:
    """The records of several indices, one after the other."""
    indices = list(indices)
    if len(indices) == 1:
        return indices[0]
    first_image = np.cumsum([0, *(len(i.images) for i in indices)])
    first_shard = np.cumsum([0, *(len(i.images.paths) for i in indices)])
    images = [i.images for i in indices]
    colors = [np.tile(_NO_CHANGE, (len(i), 1)) if i.color is None else i.color for i in indices]
    all_images = Images(
        paths=tuple(chain.from_iterable(i.paths for i in images)),
        shard_sizes=tuple(chain.from_iterable(i.shard_sizes for i in images)),
        keys=Keys.join([i.keys for i in images]),
        labels=np.concatenate([i.labels for i in images]),
        shard=np.concatenate([i.shard + s for i, s in zip(images, first_shard, strict=False)]),
        offset=np.concatenate([i.offset for i in images]),
        size=np.concatenate([i.size for i in images]),
    )
    return Index(
        all_images,
        np.concatenate([i.digest for i in indices]),
        np.concatenate([i.image + f for i, f in zip(indices, first_image, strict=False)]),
        np.concatenate([i.view for i in indices]),
        np.concatenate([i.box for i in indices]),
        np.concatenate([i.flip for i in indices]),
        np.concatenate(colors) if any(i.color is not None for i in indices) else None,
    )


def shard_file(array: str, form: Fixed | None, shard: int) -> str:
    """Place of one shard of an array: Zarr's default chunk keys."""
    axes = 1 + (len(form.shape) if form is not None else 0)
    return "/".join([array, "c", str(shard), *["0"] * (axes - 1)])


def journal_file(shard: int) -> str:
    return f"{JOURNAL}/{shard:06d}.json"
