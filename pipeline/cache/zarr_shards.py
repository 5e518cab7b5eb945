"""Write whole Zarr v3 shards, and read them by record.

zarr-python writes the metadata. This module packs and reads the shards. Every record is one inner chunk: a shard is
written at once from bytes in memory, and a record is one read at a known place. No Zarr library does this as fast
(docs/results.md has the measurements).
"""

import math
import struct
import threading
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.errors import UnstableSpecificationWarning

from pipeline.cache.format import zarr_shard_file
from pipeline.cache.stored import Fixed, Ragged
from pipeline.runtime.buffers import empty
from pipeline.storage import Ranges
from singer.errors import UserError

# This many shards have their indices read together.
_INDICES_AT_ONCE = 64
_MISSING = 2**64 - 1
# Each byte string has a header: the number of strings in the chunk, and the length of the string in bytes.
_STRING = struct.Struct("<II")


def array_metadata(arrays: dict[str, Fixed | None], records: int, shard_records: int) -> dict[str, bytes]:
    """Return {name: content} of the zarr.json files of a group with these arrays."""
    contents: dict[str, Any] = {}
    files = zarr.storage.MemoryStore(contents)
    group = zarr.open_group(files, mode="w", zarr_format=3)
    with warnings.catch_warnings():
        # Byte strings are not in the core of the Zarr specification yet. docs/cache-format.md specifies them.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        for name, form in arrays.items():
            shape, dtype = form or Fixed((), "variable_length_bytes")
            group.create_array(
                name,
                shape=(records, *shape),
                # A chunk is one record because students read records in any order.
                chunks=(1, *shape),
                shards=(shard_records, *shape),
                dtype=dtype,
                compressors=None,
            )
    return {name: buffer.to_bytes() for name, buffer in sorted(contents.items())}


def pack_zarr_shard(values: Tensor | Ragged, shard_records: int) -> list[bytes | memoryview]:
    """Return the bytes of a Zarr shard with these records, in pieces: payload, index, checksum of the index."""
    payload: list[bytes | memoryview]
    if isinstance(values, Ragged):
        lengths = values.lengths.tolist()
        strings = values.data.numpy().data
        ends = np.cumsum([0, *lengths])
        payload = []
        for start, length in zip(ends.tolist(), lengths, strict=False):
            payload += [_STRING.pack(1, length), strings[start : start + length]]
        sizes = values.lengths.numpy() + _STRING.size
    else:
        records = np.ascontiguousarray(values.numpy())
        payload = [records.reshape(-1).view(np.uint8).data]
        sizes = np.full(len(records), records[0].nbytes)
    index = np.full((shard_records, 2), _MISSING, dtype="<u8")
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    index[: len(sizes), 1] = sizes
    encoded = index.tobytes()
    return [*payload, encoded, struct.pack("<I", google_crc32c.value(encoded))]


class ByteRanges(Protocol):
    """What a reader needs from a store."""

    @property
    def url(self) -> str:
        """Return the place of the store, for messages."""

    def read_ranges(self, ranges: Ranges) -> None:
        """Read ranges of bytes into a given array."""


class ZarrArray:
    """One array of a segment, read by record. It is safe to share between threads.

    form: that of one record, None for byte strings; sizes: {file of a Zarr shard: bytes}, from the journal.
    """

    def __init__(
        self,
        store: ByteRanges,
        name: str,
        form: Fixed | None,
        records: int,
        shard_records: int,
        sizes: dict[str, int],
    ) -> None:
        self.store, self.form, self._sizes = store, form, sizes
        self._records, self._shard_records = records, shard_records
        self.files = [zarr_shard_file(name, form, shard) for shard in range(-(-records // shard_records))]
        # For each shard: whether its index was read.
        self._known = np.zeros(len(self.files), dtype=np.bool_)
        # The offset and the size in bytes of every record, (records, 2), where its shard is known. It is None while all
        # known records have one size and are in the order of their numbers.
        self._places = None if form is not None else np.empty((records, 2), np.int64)
        self._lock = threading.Lock()

    def find(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the Zarr shards of some records, their offsets in these, and their lengths in bytes, (n,) int64 each.

        Raises UserError if the index of a Zarr shard is damaged.
        """
        shards, within = np.divmod(records, self._shard_records)
        if not self._known[shards].all():
            with self._lock:
                self._read_indices(np.unique(shards[~self._known[shards]]))
        if self._places is None:
            return shards, within * self.record_size, np.full(len(records), self.record_size)
        found = self._places[records]
        head = _STRING.size if self.form is None else 0
        return shards, found[:, 0] + head, found[:, 1] - head

    @cached_property
    def record_size(self) -> int:
        """Return the decoded size of one record, in bytes."""
        assert self.form is not None
        return math.prod(self.form.shape) * np.dtype(self.form.dtype).itemsize

    def _read_indices(self, shards: np.ndarray) -> None:
        """Read the indices of some Zarr shards, many at once, because each of them is a request of its own."""
        size = 16 * self._shard_records + 4
        for some in np.split(shards, np.arange(_INDICES_AT_ONCE, len(shards), _INDICES_AT_ONCE)):
            files = [self.files[shard] for shard in some.tolist()]
            ends = np.array([self._sizes[file] for file in files])
            data = np.empty((len(files), size), np.uint8)
            numbers = np.arange(len(files))
            self.store.read_ranges(
                Ranges(files, numbers, ends - size, np.full(len(files), size), data.reshape(-1), numbers * size)
            )
            for shard, index in zip(some.tolist(), data, strict=True):
                self._take_index(shard, index)

    def _take_index(self, shard: int, data: np.ndarray) -> None:
        file, first = self.files[shard], shard * self._shard_records
        encoded, checksum = data[:-4].tobytes(), data[-4:].tobytes()
        index = np.frombuffer(encoded, dtype="<i8").reshape(-1, 2)[: self._records - first]
        offsets, sizes = index[:, 0], index[:, 1]
        # Memory is allocated by the sizes in the index, so impossible offsets and sizes are refused here.
        right = struct.pack("<I", google_crc32c.value(encoded)) == checksum and offsets.min() >= 0
        right = right and bool(
            (sizes >= _STRING.size).all() if self.form is None else (sizes == self.record_size).all()
        )
        if not right or sizes.min() < 0 or max(offsets.max(), sizes.max(), (offsets + sizes).max()) > self._sizes[file]:
            raise UserError(f"{self.store.url}/{file} is damaged; run singer cache verify")
        places = self._places
        if places is None and (offsets != self.record_size * np.arange(len(index))).any():
            # No writer of singer changes the order of records, but the Zarr format allows any order.
            numbers = np.arange(self._records) % self._shard_records
            places = np.stack([numbers * self.record_size, np.full(self._records, self.record_size)], axis=1)
        if places is not None:
            places[first : first + len(index)] = index
            self._places = places
        self._known[shard] = True


def read_arrays(groups: Sequence[tuple[ZarrArray, np.ndarray, np.ndarray]], count: int) -> Tensor | Ragged:
    """Read `count` records from several arrays that have the same form.

    groups: [(array, its records, their places in the result)].
    """
    form = groups[0][0].form
    found = [(array, array.find(records), places) for array, records, places in groups]
    if form is not None:
        out = empty((count, *form.shape), form.dtype)
        starts = np.arange(count) * groups[0][0].record_size
    else:
        lengths = np.empty(count, np.int64)
        for _, (_, _, own), places in found:
            lengths[places] = own
        out = empty((int(lengths.sum()),), "uint8")
        starts = np.cumsum(lengths) - lengths
    flat = out.numpy().reshape(-1).view(np.uint8)
    for array, where, places in found:
        array.store.read_ranges(Ranges(array.files, *where, flat, starts[places]))
    return out if form is not None else Ragged(out, torch.from_numpy(lengths))
