"""Read and write the index of a cache, which says which image and which view each record is."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pipeline.cache.format import IMAGES, RECORDS
from pipeline.cache.manifest import Manifest
from pipeline.data import Images, Keys, Skipped
from pipeline.data.images import join_files, longest_classes
from pipeline.data.views import View
from pipeline.storage import Store
from singer.errors import UserError

_NO_CHANGE = np.array([1, 1, 1, 0], dtype=np.float32)


@dataclass(frozen=True)
class Index:
    """The image and the view of each record, and where the images are. It has only images that can be decoded.

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

    @cached_property
    def first_image(self) -> np.ndarray:
        """Return for each record the number of the first image with the same bytes, (records,).

        Views that were appended later, and copies of a file, are of images with other numbers.
        """
        _, first, same = np.unique(self.digest, return_index=True, return_inverse=True)
        found: np.ndarray = first[same][self.image]
        return found

    def key(self, record: int) -> str:
        """Return the key of the record's image."""
        return self.images.keys[int(self.image[record])]

    def record_view(self, record: int) -> View:
        """Return the view of a record."""
        left, upper, right, lower = (float(v) for v in self.box[record])
        color = None
        if self.color is not None:
            brightness, contrast, saturation, hue = (float(v) for v in self.color[record])
            color = brightness, contrast, saturation, hue
        return View((left, upper, right, lower), bool(self.flip[record]), color)

    def record_bytes(self) -> bytes:
        """Return the content of records.safetensors: all columns but those that follow from the listed images."""
        columns = {"image.digest": self.digest, "record.box": self.box, "record.flip": self.flip}
        return save_columns(columns | ({} if self.color is None else {"record.color": self.color}))


def number_records(images: int, first_view: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and the view number of every record, (records,) int32 each.

    Records are numbered image by image and, for each image, view by view.
    """
    image = np.repeat(np.arange(images, dtype=np.int32), views)
    return image, np.tile(np.arange(first_view, first_view + views, dtype=np.int32), images)


def image_bytes(images: Images) -> bytes:
    """Return the content of images.safetensors: the listed images, and what was skipped in the shards."""
    columns = {
        "image.key_bytes": images.keys.text,
        "image.key_end": images.keys.ends,
        "image.label": images.labels,
        "image.shard": images.container,
        "image.offset": images.offset,
        "image.size": images.size,
        "shard.size": np.array(images.container_sizes, dtype=np.int64),
    }
    if images.files is not None:
        columns |= {"image.file_bytes": images.files.text, "image.file_end": images.files.ends}
    about: dict[str, Any] = {
        "shards": [str(p) for p in images.paths],
        "skipped": [vars(s) for s in images.skipped],
        "classes": images.classes,
    }
    # There is one metadata entry because safetensors writes several entries in no fixed order.
    return save_columns(columns, {"listing": json.dumps(about)})


def read_images(store: Store) -> Images:
    """Read the images that were listed for a segment. Raises UserError if the file is missing or damaged."""
    with _reading(store, IMAGES) as (columns, about):
        listing = json.loads(about["listing"])
        files = Keys(columns["image.file_bytes"], columns["image.file_end"]) if "image.file_end" in columns else None
        return Images(
            paths=tuple(map(Path, listing["shards"])),
            container_sizes=tuple(columns["shard.size"].tolist()),
            keys=Keys(columns["image.key_bytes"], columns["image.key_end"]),
            labels=columns["image.label"],
            container=columns["image.shard"],
            offset=columns["image.offset"],
            size=columns["image.size"],
            skipped=tuple(Skipped(**entry) for entry in listing["skipped"]),
            files=files,
            classes=tuple(map(str, listing["classes"])),
        )


def read_records(store: Store, images: Images, manifest: Manifest) -> Index:
    """Read the index of a complete segment. images: those that can be decoded. Raises UserError like read_images."""
    with _reading(store, RECORDS) as (columns, _):
        image, view = number_records(len(images), manifest.views["first"], manifest.views_each)
        shapes = {columns["image.digest"].shape: (len(images),), columns["record.box"].shape: (len(image), 4)}
        if any(there != expected for there, expected in shapes.items()) or len(columns["record.flip"]) != len(image):
            raise ValueError(f"its columns are not those of {len(images)} images")
        color = columns.get("record.color")
        return Index(images, columns["image.digest"], image, view, columns["record.box"], columns["record.flip"], color)


def save_columns(columns: Mapping[str, np.ndarray], about: dict[str, str] | None = None) -> bytes:
    """Return the content of a safetensors file with some arrays. about: its metadata."""
    # safetensors writes the memory of an array and ignores its strides.
    rows = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    data: bytes = safetensors.numpy.save(rows, metadata=about)
    return data


@contextmanager
def _reading(store: Store, name: str) -> Iterator[tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Give the arrays and the metadata of a safetensors file.

    Raises UserError if the file is missing, or if anything is wrong with its content.
    """
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
    """Concatenate the records of several indices."""
    indices = list(indices)
    if len(indices) == 1:
        return indices[0]
    first_image = np.cumsum([0, *(len(i.images) for i in indices)])
    first_shard = np.cumsum([0, *(len(i.images.paths) for i in indices)])
    images = [i.images for i in indices]
    colors = [np.tile(_NO_CHANGE, (len(i), 1)) if i.color is None else i.color for i in indices]
    all_images = Images(
        paths=tuple(chain.from_iterable(i.paths for i in images)),
        container_sizes=tuple(chain.from_iterable(i.container_sizes for i in images)),
        keys=Keys.join([i.keys for i in images]),
        labels=np.concatenate([i.labels for i in images]),
        container=np.concatenate([i.container + s for i, s in zip(images, first_shard, strict=False)]),
        offset=np.concatenate([i.offset for i in images]),
        size=np.concatenate([i.size for i in images]),
        files=join_files(images),
        classes=longest_classes(images),
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
