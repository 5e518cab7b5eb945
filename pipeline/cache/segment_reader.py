"""Read the arrays of a segment: some of its records, in any order, in their stored form."""

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration
from pipeline.cache.format import CALIBRATION, VIEWS
from pipeline.cache.index import Index, read_images
from pipeline.cache.segments import Files, Segment
from pipeline.cache.stored import Ragged
from pipeline.cache.zarr_shards import ByteRanges, ZarrArray, read_arrays
from pipeline.config import LocalCopy
from pipeline.storage import CopyRoom, ReadThrough
from pipeline.storage.tensors import parse_tensors
from singer.errors import UserError


class SegmentReader:
    """The arrays of a segment.

    files: the files of its Zarr shards, at least of those that are read; local_copy: where they are copied to
    when they are first read.
    """

    def __init__(self, segment: Segment, files: Files, local_copy: LocalCopy | None = None) -> None:
        self.segment = segment
        self._sizes = {n: int(f["bytes"]) for n, f in files.items()}
        self._source: ByteRanges = segment.store
        if local_copy is not None:
            folder, gb = local_copy
            room = None if gb is None else CopyRoom(folder, round(gb * 1e9))
            checksums = {n: f["sha256"] for n, f in files.items()}
            own = folder / segment.manifest.id()[:16]
            self._source = ReadThrough(segment.store, own, checksums, room, self._sizes)
        self._arrays: dict[str, ZarrArray] = {}

    def array(self, name: str) -> ZarrArray:
        """Return an array by its name."""
        if name not in self._arrays:
            m = self.segment.manifest
            form = m.arrays()[name]
            self._arrays[name] = ZarrArray(self._source, name, form, m.records, m.shard_records, self._sizes)
        return self._arrays[name]

    def read(self, name: str, records: np.ndarray) -> Tensor | Ragged:
        """Read some records of an array, in the given order."""
        order = np.argsort(records)
        return read_arrays([(self.array(name), records[order], order)], len(records))


def read_index(reader: SegmentReader, records: np.ndarray) -> tuple[np.ndarray, Index]:
    """Return the numbers of the records that have an image that can be decoded, and an index of these records.

    The segment need not be complete. In the index, each record has an image of its own, with the number of the record.
    """
    segment, manifest = reader.segment, reader.segment.manifest
    stored = reader.read(VIEWS, records)
    assert isinstance(stored, Tensor)
    views = stored.numpy().reshape(-1).view(manifest.view_form)
    records, views = records[views["width"] > 0], views[views["width"] > 0]
    image, view = np.divmod(records, manifest.views_each)
    color = views["color"] if "color" in (views.dtype.names or ()) else None
    images = read_images(segment.store).select(image)
    first = manifest.views["first"]
    return records, Index(
        images, views["digest"], np.arange(len(records)), first + view, views["box"], views["flip"], color
    )


def read_calibration(segment: Segment, device: torch.device | str = "cpu") -> dict[int, Calibration]:
    """Read {block: calibration} of a segment, on a device. Raises UserError if its file is damaged."""
    file = f"{segment.store.url}/{CALIBRATION}"
    tensors = parse_tensors(segment.store.read(CALIBRATION), file)
    try:
        return {
            block: Calibration.from_tensors(
                {n.removeprefix(f"{block}."): t for n, t in tensors.items() if n.startswith(f"{block}.")}
            ).to(device)
            for block in segment.manifest.blocks
        }
    except KeyError as error:
        raise UserError(f"{file} is damaged: it has no {error}") from None
