"""What lies where in a cache. docs/cache-format.md is normative; where this file differs, this file is wrong."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.cache.codecs import CODECS
from pipeline.outputs import read_as, read_json
from pipeline.shards import ImageFile, Images
from pipeline.views import View, apply_view

FORMAT = "singer-feature-cache"
VERSION = 1

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
TAIL = "tail.safetensors"
CALIBRATION = "calibration.safetensors"
JOURNAL = "journal"
FEATURES = "features"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherManifest(_Part):
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


class DataManifest(_Part):
    """The images. hash: SHA-256 of keys, labels and places (Images.content_hash)."""

    shards: tuple[str, ...]
    images: int
    labelled: int
    hash: str


class Manifest(_Part):
    """All that defines a cache. Written once, before any feature."""

    format: Literal["singer-feature-cache"] = "singer-feature-cache"
    version: Literal[1] = 1
    teacher: TeacherManifest
    data: DataManifest
    views: dict[str, Any]
    blocks: tuple[int, ...]
    codec: str
    records: int
    shard_records: int
    tail_first_block: int

    @property
    def tokens(self) -> int:
        rows, columns = self.teacher.grid
        return self.teacher.prefix_tokens + rows * columns

    @property
    def shards(self) -> int:
        """Number of Zarr shards of each array."""
        return -(-self.records // self.shard_records)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First record of a shard and the one behind its last."""
        return shard * self.shard_records, min(self.records, (shard + 1) * self.shard_records)

    def identity(self) -> dict[str, Any]:
        """All but the teacher's name, which may be a path: its weights say which one it is."""
        value = self.model_dump(mode="json")
        del value["teacher"]["name"]
        return value

    def id(self) -> str:
        """SHA-256 of the identity: the name by which refiners and runs refer to the cache."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Raises ValueError if there is no cache of this version at `path`."""
    value = read_json(path / MANIFEST, "feature cache")
    if value.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST} does not describe a singer feature cache")
    if value.get("version") != VERSION:
        raise ValueError(f"{path} has cache format version {value.get('version')}; this singer reads {VERSION}")
    manifest = read_as(path / MANIFEST, Manifest, "feature cache")
    if manifest.codec not in CODECS:
        raise ValueError(f"{path} uses codec {manifest.codec!r}; known: {', '.join(CODECS)}")
    return manifest


class Index:
    """Which image and view each record is, and where the image lies. Record = image · views + view."""

    def __init__(self, images: Images, image: np.ndarray, view: np.ndarray, box: np.ndarray, flip: np.ndarray):
        self.images, self.image, self.view, self.box, self.flip = images, image, view, box, flip

    def __len__(self) -> int:
        return len(self.image)

    def record_view(self, record: int) -> View:
        left, upper, right, lower = (float(v) for v in self.box[record])
        return View((left, upper, right, lower), bool(self.flip[record]))

    def pixels(self, files: ImageFile, records: Iterable[int] | np.ndarray, size: int) -> Tensor:
        """The views of some records at a resolution, (n, size, size, 3) uint8."""
        views = [apply_view(files.read(int(self.image[r])), self.record_view(int(r)), size) for r in records]
        return torch.from_numpy(np.stack(views))

    def to_bytes(self) -> bytes:
        keys = [k.encode() for k in self.images.keys]
        return safetensors.numpy.save(
            {
                "image.key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
                "shard.size": np.array(self.images.shard_sizes, dtype=np.int64),
                "image.key_end": np.cumsum([len(k) for k in keys], dtype=np.int64),
                # safetensors writes the memory of an array, whatever its strides.
                "image.label": np.ascontiguousarray(self.images.labels),
                "image.shard": np.ascontiguousarray(self.images.shard),
                "image.offset": np.ascontiguousarray(self.images.offset),
                "image.size": np.ascontiguousarray(self.images.size),
                "record.image": np.ascontiguousarray(self.image),
                "record.view": np.ascontiguousarray(self.view),
                "record.box": np.ascontiguousarray(self.box),
                "record.flip": np.ascontiguousarray(self.flip),
            },
            metadata={"shards": json.dumps([str(p) for p in self.images.paths])},
        )


def read_index(path: Path) -> Index:
    """Raises ValueError if the index is missing or damaged."""
    file = path / INDEX
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            shards = json.loads((opened.metadata() or {})["shards"])
            columns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        end = columns["image.key_end"]
        text = columns["image.key_bytes"].tobytes()
        starts = np.concatenate([[0], end[:-1]]) if len(end) else end
        images = Images(
            paths=tuple(Path(p) for p in shards),
            shard_sizes=tuple(columns["shard.size"].tolist()),
            keys=tuple(text[a:b].decode() for a, b in zip(starts, end, strict=True)),
            labels=columns["image.label"],
            shard=columns["image.shard"],
            offset=columns["image.offset"],
            size=columns["image.size"],
        )
        return Index(
            images,
            columns["record.image"],
            columns["record.view"],
            columns["record.box"],
            columns["record.flip"],
        )
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def array_path(block: int, part: str) -> str:
    """Place of one array within the Zarr group."""
    return f"{FEATURES}/{block}/{part}"


def shard_file(block: int, part: str, shard: int, axes: int) -> str:
    """Place of one shard of an array: Zarr's default chunk keys."""
    return "/".join([array_path(block, part), "c", str(shard), *["0"] * (axes - 1)])
