"""A folder of image files; its sub-folders are classes. The same images in the same order as `singer prepare` packs."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.image_keys import file_keys
from pipeline.data.images import Skipped
from pipeline.data.source_listing import NO_LABEL, ChangedImage, SourceListing
from pipeline.data.sources.class_folders import check_filled, list_folder
from pipeline.data.sources.kind import Kind, Options, Samples, file_size
from pipeline.data.walk import stem_of
from singer.errors import UserError


class FileReader:
    """Reads files below a folder, which are open only while they are read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, file: str, offset: int, size: int, most: int, where: str) -> bytes:
        """Return the bytes of an image, or its first `most`. Raises UserError if they cannot be read."""
        try:
            with (self._path / file).open("rb", buffering=0) as opened:
                data, now = opened.read(min(size, most)), os.fstat(opened.fileno()).st_size
        except PermissionError as error:
            raise ChangedImage(f"{where}: {error.strerror}") from None
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; if it has moved, give its place with --images") from None
        if now != size or len(data) < min(size, most):
            raise ChangedImage(f"{where}: the file has changed since it was listed: {size} bytes, now {now}")
        return data

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _list(path: Path, options: Options) -> SourceListing:
    listing = list_folder(path)
    check_filled(listing)
    start = len(str(path)) + 1
    names = [entry.file[start:] for entry in listing.entries]
    keys = file_keys(names)
    # `singer prepare` shuffles like this, so that its shards have all classes.
    order = np.random.default_rng(options.seed).permutation(len(names)).tolist()
    labels = [NO_LABEL if (label := listing.entries[n].label) is None else label for n in order]
    samples = Samples([keys[n] for n in order], labels, files=[names[n] for n in order])
    add_files(samples, path)
    return samples.listing(sum(samples.sizes), listing.classes, listing.left_out)


def add_files(samples: Samples, path: Path) -> None:
    """Add sizes and defects of files that are named relative to a folder."""
    samples.offsets = [0] * len(samples.keys)
    for number, name in enumerate(samples.files or ()):
        size = 0
        try:
            size = file_size(name if name.startswith("/") else f"{path}/{name}")
        except UserError as error:
            samples.defects.append((number, samples.keys[number], f"({name}) {error}"))
        samples.sizes.append(size)


def _beside(
    path: Path, extension: str, keys: Sequence[str], files: Sequence[str], offsets: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    maps, sizes = [], np.zeros(len(keys), dtype=np.int64)
    for row, (key, file) in enumerate(zip(keys, files, strict=True)):
        name = f"{stem_of(file)}.{extension}"
        try:
            sizes[row] = file_size(name if name.startswith("/") else f"{path}/{name}")
        except UserError as error:
            reason = f"needs a .{extension} beside it, but {name} {error}"
            raise UserError(str(Skipped(str(path), key, reason))) from None
        maps.append(name)
    return maps, np.zeros_like(sizes), sizes


FOLDER = Kind("folder", Path.is_dir, _list, FileReader, _beside, named=True)
