"""Shards: tars in the layout of WebDataset."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.images import Skipped
from pipeline.data.source_listing import NO_LABEL, SourceListing, key_hash
from pipeline.data.sources.kind import Kind, Options
from pipeline.data.tar_members import Defect
from pipeline.data.tars import contents, read_samples
from pipeline.storage import Opened, OpenFile
from singer.errors import UserError

_ROW = np.dtype("i8,u8,i4,i8,i8,?")


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


def list_tar(path: Path, options: Options) -> SourceListing:
    """List the samples of a shard. Its content raises no error: defects are listed."""
    found, damage = read_samples(path, image_key=options.image_key)
    samples = found.all
    defects = [(-1, "", damage)] if damage is not None else []
    rows = np.zeros(len(samples), dtype=_ROW)
    text = bytearray()
    for number, sample in enumerate(samples):
        key = sample.key.encode(errors="backslashreplace")
        text += key
        defects += [(number, sample.key, f"has two members .{extension}") for extension in sample.repeated]
        try:
            label, image = contents(sample, options.image_key)
            rows[number] = len(text), key_hash(key), label, image.offset, image.size, True
        except Defect as defect:
            defects.append((number, sample.key, str(defect)))
            rows[number] = len(text), key_hash(key), NO_LABEL, 0, 0, False
    ends, hashes, labels, offsets, sizes, usable = (np.ascontiguousarray(rows[name]) for name in _ROW.names or ())
    letters = np.frombuffer(bytes(text), np.uint8)
    columns = (letters, ends, hashes, labels, offsets, sizes, usable)
    return SourceListing(path.stat().st_size, *columns, defects, left_out=found.left_out)


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


TAR = Kind("shard", lambda path: not path.is_dir(), list_tar, TarReader, _beside)
