"""What lies where in a cache. docs/cache-format.md is normative; where this file differs, this file is wrong."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict

from pipeline.cache.codecs import CODECS, Fixed, Layout
from pipeline.outputs import is_sealed, json_bytes, read_json, sealed, validated
from pipeline.shards import Images, Keys
from pipeline.stores import Store
from pipeline.views import View
from singer.errors import UserError

FORMAT = "singer-feature-cache"
VERSION = 2

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
TAIL = "tail.safetensors"
CALIBRATION = "calibration.safetensors"
FIDELITY = "fidelity.json"
SKIPPED = "skipped.json"
JOURNAL = "journal"
FEATURES = "features"
POSITIONS = "positions"
PIXELS = "pixels"
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
        return hashlib.sha256(_canonical(self.identity()).encode()).hexdigest()

    @property
    def variant(self) -> str:
        """The short name of this teacher as it was run, such as vit_tiny_patch16_224@0a1b2c3d."""
        return f"{self.architecture}@{self.digest()[:8]}"


class DataManifest(_Section):
    """The images. hash: SHA-256 of keys, labels and encoded bytes (shards.content_hash)."""

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
    """All that defines a part of a cache. Written once, before any feature.

    views: how views were drawn, with `first` and `count` for their numbers; stored_patches: patch tokens a record;
    files: SHA-256 of the small files beside it.
    """

    format: Literal["singer-feature-cache"] = "singer-feature-cache"
    version: Literal[1, 2] = 2
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
    # Version 1 hashed other fields.
    first_id: str | None = None

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
        return arrays

    def compression(self, array: str) -> str:
        """Only features are compressed, and of these only the parts of one size."""
        return self.lossless if array.startswith(FEATURES) and self.arrays()[array] is not None else "none"

    def rows(self) -> str:
        """Which images and views: equal for parts that hold other blocks of the same records."""
        return _canonical([self.data.hash, self.views])

    def identity(self) -> dict[str, Any]:
        """What a cache must agree in to be the same: all but names and places."""
        value = self.model_dump(mode="json", exclude={"files", "first_id"})
        value["teacher"] = self.teacher.identity()
        del value["data"]["shards"]
        return value

    def id(self) -> str:
        """SHA-256 of the identity: the name by which refiners and runs refer to the cache."""
        return self.first_id or hashlib.sha256(_canonical(self.identity()).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        return json_bytes(sealed(self.model_dump(mode="json", exclude={"first_id"})))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_manifest(store: Store) -> Manifest:
    """Raises UserError if there is no cache of a known version in the store."""
    value = read_json(store, MANIFEST, "feature cache")
    file = f"{store.url}/{MANIFEST}"
    if value.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a singer feature cache")
    if value.get("version") == 1:
        value = _from_version_1(value, file)
    elif value.get("version") != VERSION:
        raise UserError(f"{store.url} has cache format version {value.get('version')}; this singer reads 1 and 2")
    elif not is_sealed(value):
        raise UserError(f"{file} is damaged: it does not match its own checksum")
    else:
        del value["sha256"]
    manifest = validated(value, Manifest, file)
    if manifest.codec not in CODECS:
        raise UserError(f"{store.url} uses codec {manifest.codec!r}; known: {', '.join(CODECS)}")
    return manifest


def _from_version_1(value: dict[str, Any], file: str) -> dict[str, Any]:
    try:
        teacher = {k: v for k, v in value["teacher"].items() if k != "name"}
        first_id = hashlib.sha256(_canonical({**value, "teacher": teacher}).encode()).hexdigest()
        return {
            **value,
            "codec": "int8-plain" if value["codec"] == "int8" else value["codec"],
            "stored_patches": teacher["grid"][0] * teacher["grid"][1],
            "lossless": "none",
            "pixels": None,
            "first_id": first_id,
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged: fields are missing") from None


@dataclass(frozen=True)
class Index:
    """Which image and view each record is, and where the image lies.

    digest: (images,) uint64, or None in version 1; image, view: (records,) int32; box: (records, 4) float32; flip:
    (records,) bool; color: (records, 4) float32, or None.
    """

    images: Images
    digest: np.ndarray | None
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

    def to_bytes(self) -> bytes:
        columns = {
            "image.key_bytes": self.images.keys.text,
            "image.key_end": self.images.keys.ends,
            "image.label": self.images.labels,
            "image.shard": self.images.shard,
            "image.offset": self.images.offset,
            "image.size": self.images.size,
            "shard.size": np.array(self.images.shard_sizes, dtype=np.int64),
            "record.image": self.image,
            "record.view": self.view,
            "record.box": self.box,
            "record.flip": self.flip,
        }
        optional = {"image.digest": self.digest, "record.color": self.color}
        columns |= {name: column for name, column in optional.items() if column is not None}
        # safetensors writes the memory of an array, whatever its strides.
        data: bytes = safetensors.numpy.save(
            {name: np.ascontiguousarray(column) for name, column in columns.items()},
            metadata={"shards": json.dumps([str(p) for p in self.images.paths])},
        )
        return data


def read_index(store: Store) -> Index:
    """Raises UserError if the index is missing or damaged."""
    file = f"{store.url}/{INDEX}"
    try:
        data = store.read(INDEX)
        columns = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        images = Images(
            paths=tuple(Path(p) for p in json.loads(header["__metadata__"]["shards"])),
            shard_sizes=tuple(columns["shard.size"].tolist()),
            keys=Keys(columns["image.key_bytes"], columns["image.key_end"]),
            labels=columns["image.label"],
            shard=columns["image.shard"],
            offset=columns["image.offset"],
            size=columns["image.size"],
        )
        return Index(
            images,
            columns.get("image.digest"),
            image=columns["record.image"],
            view=columns["record.view"],
            box=columns["record.box"],
            flip=columns["record.flip"],
            color=columns.get("record.color"),
        )
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from None


def join(indices: Iterable[Index]) -> Index:
    """The records of several indices, one behind the other."""
    indices = list(indices)
    if len(indices) == 1:
        return indices[0]
    first_image = np.cumsum([0, *(len(i.images) for i in indices)])
    first_shard = np.cumsum([0, *(len(i.images.paths) for i in indices)])
    images = [i.images for i in indices]
    digests = [i.digest for i in indices]
    colors = [np.tile(_NO_CHANGE, (len(i), 1)) if i.color is None else i.color for i in indices]
    all_images = replace(
        images[0],
        paths=sum((i.paths for i in images), ()),
        shard_sizes=sum((i.shard_sizes for i in images), ()),
        keys=Keys.of(key for i in images for key in i.keys),
        labels=np.concatenate([i.labels for i in images]),
        shard=np.concatenate([i.shard + s for i, s in zip(images, first_shard, strict=False)]),
        offset=np.concatenate([i.offset for i in images]),
        size=np.concatenate([i.size for i in images]),
    )
    return Index(
        all_images,
        np.concatenate([d for d in digests if d is not None]) if all(d is not None for d in digests) else None,
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
