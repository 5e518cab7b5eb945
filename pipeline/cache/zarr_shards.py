"""Zarr v3 shards, written whole and read by record.

zarr-python writes the metadata. Shards are packed and read here: every record is one inner chunk, so that a shard is
one write of bytes at hand and a record is one read at a known place, which no Zarr library does as fast
(docs/results.md has the measurements).
"""

import math
import struct
import warnings
from collections.abc import Sequence
from itertools import pairwise
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

    def read_ranges(self, name: str, offsets: Sequence[int], buffers: Sequence[memoryview]) -> None: ...


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
        shard_records: int,
        sizes: dict[str, int],
    ) -> None:
        self._store, self._name, self.form = store, name, form
        self._compressor = _compressor(compression)
        self._shard_records, self._sizes = shard_records, sizes
        self._indices: dict[int, np.ndarray | None] = {}

    def read_into(self, records: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Fill out[places[i]] (contiguous, of the array's shape and dtype) with record records[i]."""
        assert self.form is not None
        row = out.nbytes // max(1, len(out))
        flat = out.reshape(-1).view(np.uint8).data
        for shard, slots, within in self._by_shard(records):
            rows = [flat[i : i + row] for i in (places[slots] * row).tolist()]
            file, index = shard_file(self._name, self.form, shard), self._index(shard)
            if self._compressor is None:
                offsets = (within * row if index is None else index[within, 0]).tolist()
                self._store.read_ranges(file, offsets, rows)
            else:
                assert index is not None
                chunks = [bytearray(size) for size in index[within, 1].tolist()]
                self._store.read_ranges(file, index[within, 0].tolist(), [memoryview(c) for c in chunks])
                for chunk, target in zip(chunks, rows, strict=True):
                    self._compressor.decode(chunk, out=target)

    def read_strings(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bytes of all records one behind the other, their lengths)."""
        assert self.form is None
        groups = self._by_shard(records)
        offsets, lengths = np.empty(len(records), np.int64), np.empty(len(records), np.int64)
        for shard, slots, within in groups:
            index = self._index(shard)
            assert index is not None
            offsets[slots] = index[within, 0] + _STRING.size
            lengths[slots] = index[within, 1] - _STRING.size
        ends = np.cumsum(lengths)
        starts = ends - lengths
        data = np.empty(int(lengths.sum()), dtype=np.uint8)
        flat = data.data
        for shard, slots, _ in groups:
            filled = slots[lengths[slots] > 0]
            places = zip(starts[filled].tolist(), ends[filled].tolist(), strict=True)
            buffers = [flat[start:end] for start, end in places]
            self._store.read_ranges(shard_file(self._name, None, shard), offsets[filled].tolist(), buffers)
        return data, lengths

    def _by_shard(self, records: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """[(shard, positions in `records`, records within the shard)], in the order in which they are stored."""
        order = np.argsort(records)
        shards, within = np.divmod(records[order], self._shard_records)
        cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(records)]
        return [(int(shards[a]), order[a:b], within[a:b]) for a, b in pairwise(cuts) if b > a]

    def _index(self, shard: int) -> np.ndarray | None:
        """(offset, bytes) of every record of a shard; None where they follow each other at one size."""
        if shard not in self._indices:
            file = shard_file(self._name, self.form, shard)
            data = bytearray(16 * self._shard_records + 4)
            self._store.read_ranges(file, [self._sizes[file] - len(data)], [memoryview(data)])
            if struct.pack("<I", google_crc32c.value(bytes(data[:-4]))) != data[-4:]:
                raise ValueError(f"{self._store.url}/{file} is damaged; run singer cache verify")
            index = np.frombuffer(data, dtype="<u8", count=2 * self._shard_records).reshape(-1, 2)
            index = index[index[:, 0] != _MISSING].astype(np.int64)
            self._indices[shard] = None if self._regular(index) else index
        return self._indices[shard]

    def _regular(self, index: np.ndarray) -> bool:
        if self.form is None or self._compressor is not None:
            return False
        row = math.prod(self.form.shape) * np.dtype(self.form.dtype).itemsize
        return bool((index[:, 1] == row).all() and (index[:, 0] == row * np.arange(len(index))).all())
