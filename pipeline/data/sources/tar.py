"""Shards: tars in the layout of WebDataset."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.images import Skipped
from pipeline.data.listed import SourceListing
from pipeline.data.sources.kind import Kind, Options
from pipeline.data.tars import list_tar, read_samples
from pipeline.storage import Opened, OpenFile
from singer.errors import UserError


class TarReader:
    """Reads members of a tar by their place. The file stays open while the pool of open files has room."""

    def __init__(self, path: Path) -> None:
        self._file = OpenFile(path)
        # The file's stamp when it was first opened.
        self._stamp: tuple[int, int] | None = None

    def read(self, file: str, offset: int, size: int, most: int, where: str) -> bytes:
        """Return the bytes of an image, or its first `most`. Raises UserError if they cannot be read."""
        wanted = min(size, most)
        try:
            with Opened((self._file,)) as (descriptor,):
                data, stamp = os.pread(descriptor, wanted, offset), self._file.stamp
        except OSError as error:
            raise UserError(f"shard {self._file.path}: {error.strerror}") from None
        self._stamp = self._stamp or stamp
        # The file may have been closed and opened again, and another file holds something else at these places.
        if self._stamp != stamp:
            raise UserError(f"{where}: the shard has changed since this run began; start it again")
        if len(data) < wanted:
            raise UserError(f"{where}: the shard ends {wanted - len(data)} bytes too early")
        return data

    def close(self) -> None:
        """Close the file; a later read opens it again, if it is still the same."""
        self._file = OpenFile(self._file.path)


def _list(path: Path, options: Options) -> SourceListing:
    return list_tar(path, options.image_key)


def _beside(
    path: Path, extension: str, keys: Sequence[str], files: Sequence[str], offsets: np.ndarray
) -> tuple[None, np.ndarray, np.ndarray]:
    # Images are known by their place, as keys may have got a prefix.
    samples = {m.offset: sample for sample in read_samples(path, extension)[0].all for m in sample.images.values()}
    found = np.zeros((2, len(keys)), dtype=np.int64)
    for row, (key, offset) in enumerate(zip(keys, offsets.tolist(), strict=True)):
        sample = samples.get(offset)
        member = None if sample is None else sample.members.get(extension)
        if sample is None or member is None:
            reason = f"has no .{extension}; every image needs one here"
        elif extension in sample.repeated:
            reason = f"has two members .{extension}; remove one"
        elif not member.regular or not member.size:
            reason = f"has a .{extension} that is {'empty' if member.regular else 'no regular file'}; replace it"
        else:
            found[:, row] = member.offset, member.size
            continue
        raise UserError(str(Skipped(str(path), key, reason)))
    return None, found[0], found[1]


TAR = Kind("shard", lambda path: not path.is_dir(), _list, TarReader, _beside)
