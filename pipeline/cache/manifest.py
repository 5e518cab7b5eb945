"""Describe what a segment of a cache is: its manifest, and what is known once it is complete."""

import hashlib
import json
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.cache.codecs import CODECS
from pipeline.cache.format import FEATURES, FORMAT, PIXELS, POSITIONS, VERSION, VIEWS
from pipeline.cache.stored import Fixed, Layout
from pipeline.config import InputSize
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.storage import Store
from pipeline.storage.json_files import is_sealed, json_bytes, read_json, sealed, validated
from singer.copies import Copying
from singer.errors import UserError
from singer.sizes import Size


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherManifest(_Section):
    """The teacher and its preprocessing. weights: SHA-256 (models.backbone.weight_hash).

    dtype: of the weights; width, grid: of the last block; shapes: (width, grid) of every block, None if all blocks have
    those of the last one; copies: of each view, whose features are averaged (teacher.copies).
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    weights: str
    depth: int
    width: int
    prefix_tokens: int
    class_token: bool
    grid: tuple[int, int]
    image_size: InputSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    dtype: str
    shapes: tuple[tuple[int, tuple[int, int]], ...] | None
    copies: int

    @property
    def copying(self) -> Copying | None:
        """Return how views are copied for the features; None if they are those of the views alone."""
        grids = [self.grid] if self.shapes is None else [grid for _, grid in self.shapes]
        return Copying.of(self.copies, self.image_size, grids) if self.copies > 1 else None

    def width_of(self, block: int) -> int:
        """Return the width of a block's tokens, in channels."""
        return self.width if self.shapes is None else self.shapes[block][0]

    def grid_of(self, block: int) -> tuple[int, int]:
        """Return the grid (rows, columns) of a block's patch tokens."""
        return self.grid if self.shapes is None else self.shapes[block][1]

    def patches_of(self, block: int) -> int:
        """Return the number of a block's patch tokens."""
        rows, columns = self.grid_of(block)
        return rows * columns

    @property
    def patches(self) -> int:
        """Return the number of patch tokens of the last block."""
        return self.grid[0] * self.grid[1]

    def identity(self) -> dict[str, Any]:
        """Return all fields but the name, which may be a path; the weights say which teacher it is."""
        return self.model_dump(mode="json", exclude={"name"})

    def digest(self) -> str:
        """Return the SHA-256 of the identity."""
        return hashlib.sha256(canonical(self.identity()).encode()).hexdigest()

    @property
    def variant(self) -> str:
        """Return the short name of this teacher as it was run, such as vit_tiny_patch16_224@0a1b2c3d."""
        return f"{self.architecture}@{self.digest()[:8]}"


class DataManifest(_Section):
    """The images that the shards list. hash: data.listing_hash."""

    shards: tuple[str, ...]
    images: int
    labelled: int
    hash: str


class PixelsManifest(_Section):
    """Stored views: their size in pixels and, for JPEG, the quality."""

    kind: Literal["jpeg", "uint8"]
    size: InputSize
    quality: int | None


class Manifest(_Section):
    """All that defines a segment of a cache. It is written once, before any image is read.

    views: how views are drawn; its `first` and `count` give the numbers of the views; stored_patches: patch tokens per
    record; records: the number of views of all listed images; files: SHA-256 of the small files beside the manifest.
    """

    format: Literal["singer-feature-cache"] = "singer-feature-cache"
    version: Literal[4] = 4
    teacher: TeacherManifest
    data: DataManifest
    views: dict[str, Any]
    blocks: tuple[int, ...]
    codec: str
    stored_patches: int
    pixels: PixelsManifest | None
    records: int
    shard_records: int
    tail_first_block: int
    files: dict[str, str] = {}

    def tokens_of(self, block: int) -> int:
        """Return the number of stored tokens of a record at a block."""
        return self.teacher.prefix_tokens + (self.stored_patches if self.sampled else self.teacher.patches_of(block))

    @property
    def sampled(self) -> bool:
        """Return whether only some of the patches are stored."""
        return self.stored_patches < self.teacher.patches

    @property
    def zarr_shards(self) -> int:
        """Return the number of Zarr shards of each array."""
        return -(-self.records // self.shard_records)

    def zarr_shard_range(self, shard: int) -> tuple[int, int]:
        """Return the first record of a Zarr shard, and the one after its last."""
        return shard * self.shard_records, min(self.records, (shard + 1) * self.shard_records)

    def layout(self, block: int) -> Layout:
        """Return {part: form} of a block's arrays."""
        return CODECS[self.codec].parts(self.tokens_of(block), self.teacher.width_of(block))

    def arrays(self) -> Layout:
        """Return {name: form of one record} of all arrays."""
        arrays: Layout = {f"{FEATURES}/{b}/{part}": form for b in self.blocks for part, form in self.layout(b).items()}
        if self.sampled:
            arrays[POSITIONS] = Fixed((self.stored_patches,), "int16")
        if self.pixels is not None:
            size = Size.of(self.pixels.size)
            arrays[PIXELS] = Fixed((*size, 3), "uint8") if self.pixels.kind == "uint8" else None
        arrays[VIEWS] = Fixed((self.view_form.itemsize,), "uint8")
        return arrays

    @property
    def view_form(self) -> np.dtype[np.void]:
        """Return the dtype of a record in the array `views`."""
        return view_form(any(self.views["color"]))

    @property
    def views_each(self) -> int:
        """Return the number of records per image."""
        return int(self.views["count"])

    def listed_key(self) -> str:
        """Return a text that is equal for segments with the same listed images and the same views.

        Such segments hold other blocks, or features of another teacher, for the same records. Segment.records_key is of
        what could be read of them.
        """
        return canonical([self.data.hash, self.views])

    def identity(self) -> dict[str, Any]:
        """Return the fields that two manifests of the same segment share: all but names and places."""
        value = self.model_dump(mode="json", exclude={"files"})
        value["teacher"] = self.teacher.identity()
        del value["data"]["shards"]
        return value

    def id(self) -> str:
        """Return the SHA-256 of the identity, by which the journal refers to the segment."""
        return hashlib.sha256(canonical(self.identity()).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return json_bytes(sealed(self.model_dump(mode="json")))


def view_form(color: bool) -> np.dtype[np.void]:
    """Return the dtype of a record in the array `views`: what was found when its image was read, and its view."""
    fields: list[Any] = [("digest", "<u8"), ("width", "<i4"), ("height", "<i4"), ("box", "<f4", 4), ("flip", "?")]
    return np.dtype(fields + [("color", "<f4", 4)] * color)


class Completion(_Section):
    """What is known about a segment once all its Zarr shards are done. It is written last, and completes it.

    part: the manifest's id; hash: data.content_hash of the images that can be decoded; images, labelled, records: how
    many of these there are; unreadable: the numbers of the other listed images; skipped: the number of entries in
    skipped.json, which lists all that is left out; files: SHA-256 of the small files that are written at the end;
    arrays: {name: [bytes, SHA-256] of each shard's file}.
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
        """Return the content of complete.json."""
        return json_bytes(sealed(self.model_dump(mode="json")))


def canonical(value: Any) -> str:
    """Return canonical JSON: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def read_manifest(store: Store) -> Manifest:
    """Read the manifest of a store. Raises UserError if the store has no cache of a known version."""
    value = read_json(store, CACHE_MANIFEST, "feature cache")
    file = f"{store.url}/{CACHE_MANIFEST}"
    if value.get("format") != FORMAT:
        raise UserError(f"{file} does not describe a singer feature cache")
    if (version := value.get("version")) != VERSION:
        newer = isinstance(version, int) and version > VERSION
        remedy = "install a newer singer" if newer else "make it again with cache-teacher --overwrite"
        raise UserError(f"{store.url} has cache format version {version}, not {VERSION}; {remedy}")
    if not is_sealed(value):
        raise UserError(f"{file} is damaged: it does not match its own checksum")
    del value["sha256"]
    manifest = validated(value, Manifest, file)
    if manifest.codec not in CODECS:
        raise UserError(f"{store.url} uses codec {manifest.codec!r}; known: {', '.join(CODECS)}")
    return manifest
