"""Zarr v3 shards, written whole and read by record.

zarr-python writes the metadata. Shards are packed and read here: every record is one inner chunk, so that a shard is
one write of bytes at hand and a record is one read at a known place, which no Zarr library does as fast
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
import zarr
from numcodecs import Blosc, Zstd
from numcodecs.abc import Codec as Compressor
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.errors import UnstableSpecificationWarning

from pipeline.cache.codecs import Fixed, Ragged
from pipeline.cache.format import shard_file

_MISSING = 2**64 - 1
# Ahead of every byte string: the number of strings in the chunk, and its length.
_STRING = struct.Struct("<II")
_LEVEL = {"zstd": 3, "blosc": 5}


def array_metadata(
    arrays: dict[str, Fixed | None], compression: dict[str, str], records: int, shard_records: int
) -> dict[str, bytes]:
    """{name: content} of the zarr.json files of a group with these arrays."""
    contents: dict[str, Any] = {}
    files = zarr.storage.MemoryStore(contents)
    group = zarr.open_group(files, mode="w", zarr_format=3)
    with warnings.catch_warnings():
        # Byte strings are no part of the Zarr core yet; docs/cache-format.md fixes what is written.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        for name, form in arrays.items():
            shape, dtype = form or Fixed((), "variable_length_bytes")
            group.create_array(
                name,
                shape=(records, *shape),
                # One record a chunk: students read records in any order.
                chunks=(1, *shape),
                shards=(shard_records, *shape),
                dtype=dtype,
                compressors=_zarr_compressor(compression[name], dtype),
            )
    return {name: buffer.to_bytes() for name, buffer in sorted(contents.items())}


def _zarr_compressor(compression: str, dtype: str) -> Any:
    if compression == "zstd":
        return ZstdCodec(level=_LEVEL["zstd"])
    if compression == "blosc":
        size = np.dtype(dtype).itemsize
        return BloscCodec(cname="zstd", clevel=_LEVEL["blosc"], shuffle="shuffle", typesize=size)
    return None


def _compressor(compression: str) -> Compressor | None:
    if compression == "zstd":
        return Zstd(level=_LEVEL["zstd"])
    return Blosc(cname="zstd", clevel=_LEVEL["blosc"], shuffle=Blosc.SHUFFLE) if compression == "blosc" else None


def pack_shard(values: np.ndarray | Ragged, shard_records: int, compression: str) -> list[bytes | memoryview]:
    """The bytes of a shard with these records, in pieces: payload, index, checksum of the index."""
    compressor = _compressor(compression)
    payload: list[bytes | memoryview]
    if isinstance(values, Ragged):
        lengths = values.lengths.tolist()
        strings = values.data.numpy().data
        ends = np.cumsum([0, *lengths])
        payload = []
        for start, length in zip(ends.tolist(), lengths, strict=False):
            payload += [_STRING.pack(1, length), strings[start : start + length]]
        sizes = values.lengths.numpy() + _STRING.size
    elif compressor is not None:
        payload = [compressor.encode(np.ascontiguousarray(row)) for row in values]
        sizes = np.array([len(chunk) for chunk in payload])
    else:
        values = np.ascontiguousarray(values)
        payload = [values.reshape(-1).view(np.uint8).data]
        sizes = np.full(len(values), values[0].nbytes)
    index = np.full((shard_records, 2), _MISSING, dtype="<u8")
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    index[: len(sizes), 1] = sizes
    encoded = index.tobytes()
    return [*payload, encoded, struct.pack("<I", google_crc32c.value(encoded))]


class ByteRanges(Protocol):
    """What a reader needs of a store."""

    @property
    def url(self) -> str: ...

    def read_ranges(
        self,
        names: Sequence[str],
        which: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        out: np.ndarray,
        places: np.ndarray,
    ) -> None: ...


class ShardedArray:
    """One array of a part, read by record. Safe to share between threads.

    sizes: {shard file: bytes}, from the journal.
    """

    def __init__(
        self,
        store: ByteRanges,
        name: str,
        form: Fixed | None,
        compression: str,
        records: int,
        shard_records: int,
        sizes: dict[str, int],
    ) -> None:
        self._store, self.form, self._sizes = store, form, sizes
        self._compressor = _compressor(compression)
        self._records, self._shard_records = records, shard_records
        self._files = [shard_file(name, form, shard) for shard in range(-(-records // shard_records))]
        # By shard: whether its index was read.
        self._known = np.zeros(len(self._files), dtype=np.bool_)
        # (records, 2) offset and bytes of every record of these shards; None if all follow each other at one size.
        self._places: np.ndarray | None = None
        self._lock = threading.Lock()

    def lengths(self, records: np.ndarray) -> np.ndarray:
        """Bytes of each record, of byte strings or as the array's form has them."""
        if self.form is not None:
            return np.full(len(records), self._row)
        return self._find(records)[2] - _STRING.size

    def read_into(self, records: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Fill out[places[i]:] (bytes) with record records[i]. Fastest if they are sorted."""
        shards, offsets, lengths = self._find(records)
        if self._compressor is None:
            if self.form is None:
                offsets, lengths = offsets + _STRING.size, lengths - _STRING.size
            self._store.read_ranges(self._files, shards, offsets, lengths, out, places)
            return
        ends = np.cumsum(lengths)
        chunks = np.empty(int(lengths.sum()), np.uint8)
        self._store.read_ranges(self._files, shards, offsets, lengths, chunks, ends - lengths)
        for chunk, start in zip(np.split(chunks, ends[:-1]), places.tolist(), strict=True):
            self._compressor.decode(chunk, out=out[start : start + self._row])

    @cached_property
    def _row(self) -> int:
        assert self.form is not None
        return math.prod(self.form.shape) * np.dtype(self.form.dtype).itemsize

    def _find(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, offset in it, bytes) of the chunk of every record."""
        shards, within = np.divmod(records, self._shard_records)
        if not self._known[shards].all():
            with self._lock:
                for shard in np.unique(shards[~self._known[shards]]).tolist():
                    self._read_index(shard)
        if self._places is None:
            return shards, within * self._row, np.full(len(records), self._row)
        found = self._places[records]
        return shards, found[:, 0], found[:, 1]

    def _read_index(self, shard: int) -> None:
        file, first = self._files[shard], shard * self._shard_records
        data = np.empty(16 * self._shard_records + 4, np.uint8)
        size = np.array([len(data)])
        zero = np.zeros(1, np.int64)
        self._store.read_ranges([file], zero, self._sizes[file] - size, size, data, zero)
        encoded, checksum = data[:-4].tobytes(), data[-4:].tobytes()
        index = np.frombuffer(encoded, dtype="<u8").reshape(-1, 2)[: self._records - first]
        if struct.pack("<I", google_crc32c.value(encoded)) != checksum or (index == _MISSING).any():
            raise ValueError(f"{self._store.url}/{file} is damaged; run singer cache verify")
        regular = self.form is not None and self._compressor is None
        if regular:
            rows = self._row * np.arange(len(index) + 1)
            regular = bool((index[:, 0] == rows[:-1]).all() and (index[:, 1] == self._row).all())
        if self._places is None and not regular:
            self._places = np.empty((self._records, 2), np.int64)
            if self.form is not None and self._compressor is None:
                self._places[:, 0] = np.arange(self._records) % self._shard_records * self._row
                self._places[:, 1] = self._row
        if self._places is not None:
            self._places[first : first + len(index)] = index
        self._known[shard] = True
