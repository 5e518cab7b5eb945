"""Reading a cache: batches of records in any order, decoded on the training device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration, Ragged, Stored
from pipeline.cache.format import CALIBRATION, FEATURES, PIXELS, POSITIONS, TAIL, VIEWS
from pipeline.cache.index import Index, join, read_images
from pipeline.cache.pixels import resize, stored_views, views_of
from pipeline.cache.segments import Files, Segment, read_segments
from pipeline.cache.variants import check_held_once, choose_variant, ids_of
from pipeline.cache.zarr_shards import ByteRanges, ShardedArray
from pipeline.data import ImageFile
from pipeline.data.buffers import empty
from pipeline.runtime.progress import say
from pipeline.storage import Place, ReadThrough, open_store
from pipeline.storage.outputs import parse_tensors
from singer.errors import UserError
from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class Encoded:
    """Some records as they are stored. blocks: {block: parts}; positions: (n, k) int16 patch numbers, if sampled."""

    blocks: dict[int, Stored]
    positions: Tensor | None = None

    def split(self, counts: list[int]) -> list["Encoded"]:
        """In parts of so many records, which share the memory."""
        if len(counts) == 1:
            return [self]
        pieces: list[dict[int, Stored]] = [{block: {} for block in self.blocks} for _ in counts]
        for block, parts in self.blocks.items():
            for name, part in parts.items():
                for piece, own in zip(pieces, part.split(counts), strict=True):
                    piece[block][name] = own
        positions = [None] * len(counts) if self.positions is None else self.positions.split(counts)
        return [Encoded(*piece) for piece in zip(pieces, positions, strict=True)]


class SegmentReader:
    """The arrays of a part. files: of its shards, at least of those that are read."""

    def __init__(self, part: Segment, files: Files, local_copy: Path | None = None) -> None:
        self.part = part
        self._sizes = {n: int(f["bytes"]) for n, f in files.items()}
        self._source: ByteRanges = part.store
        if local_copy is not None:
            folder = local_copy / part.manifest.id()[:16]
            self._source = ReadThrough(part.store, folder, {n: f["sha256"] for n, f in files.items()})
        self._arrays: dict[str, ShardedArray] = {}

    def array(self, name: str) -> ShardedArray:
        if name not in self._arrays:
            m = self.part.manifest
            self._arrays[name] = ShardedArray(
                self._source, name, m.arrays()[name], m.compression(name), m.records, m.shard_records, self._sizes
            )
        return self._arrays[name]

    def read(self, name: str, records: np.ndarray) -> Tensor | Ragged:
        """Some records of an array, in the order asked for."""
        order = np.argsort(records)
        return read_arrays([(self.array(name), records[order], order)], len(records))


def read_rows(reader: SegmentReader, rows: np.ndarray) -> tuple[np.ndarray, Index]:
    """Which records, as numbered where they are stored, have an image that can be decoded; and an index of just these.

    The part need not be complete; a record's image has the number of the record in this index.
    """
    part, manifest = reader.part, reader.part.manifest
    if manifest.version == 2:
        whole = part.index()
        color = None if whole.color is None else whole.color[rows]
        image = whole.image[rows]
        found = (whole.images.select(image), whole.digest[image])
        return rows, Index(*found, np.arange(len(rows)), whole.view[rows], whole.box[rows], whole.flip[rows], color)
    stored = reader.read(VIEWS, rows)
    assert isinstance(stored, Tensor)
    facts = stored.numpy().reshape(-1).view(manifest.view_form)
    rows, facts = rows[facts["width"] > 0], facts[facts["width"] > 0]
    image, view = np.divmod(rows, manifest.views_each)
    color = facts["color"] if "color" in (facts.dtype.names or ()) else None
    images = read_images(part.store).select(image)
    first = manifest.views["first"]
    return rows, Index(images, facts["digest"], np.arange(len(rows)), first + view, facts["box"], facts["flip"], color)


@dataclass(frozen=True)
class _Span:
    """Records that were added together: the parts that hold each block and, if they are stored, the views."""

    blocks: dict[int, Segment]
    pixels: Segment | None

    @property
    def main(self) -> Segment:
        return next(iter(self.blocks.values()))


_Group = tuple[int, np.ndarray, np.ndarray]
"""Number of a span, records within it, and their places among all that are asked for."""


class Cache:
    """A complete cache, opened for reading. Safe to share between threads.

    place: a folder or a URL. teacher: which one, where the cache has several: a variant (manifest.teacher.variant), or
    a name, an architecture or the beginning of the weights' hash that fits one variant only; default: the first.
    blocks: default: all. local_copy: a folder to which shards are copied when they are first read. known: the id that a
    refiner or a run has of the cache, which opens its variant if it is there. option: what names a variant, for the
    message. Raises UserError if there is no cache, if shards are missing, if several variants fit, or if records lack a
    block.
    """

    def __init__(
        self,
        place: Place,
        teacher: str | None = None,
        blocks: Sequence[int] | None = None,
        local_copy: Path | None = None,
        known: str | None = None,
        option: str = "teacher={}",
    ) -> None:
        self.place = place
        self._arguments = (place, teacher, blocks, local_copy, known, option)
        self._readers: dict[str, SegmentReader] = {}
        parts = self._complete(read_segments(open_store(place)), local_copy)
        self._parts = choose_variant(parts, place, teacher, known, option)
        check_held_once(self._parts)
        self.manifest = self._parts[0].manifest
        if blocks is not None and len(set(blocks)) != max(1, len(blocks)):
            raise UserError(f"blocks must be one or more different ones, not {list(blocks)}")
        held = sorted({b for p in self._parts for b in p.manifest.blocks})
        self.blocks = tuple(held if blocks is None else sorted(blocks))
        self._spans = self._find_spans(parts)
        counts = [s.main.records for s in self._spans]
        self._starts, self._count = np.cumsum([0, *counts])[:-1], sum(counts)
        self._codec = CODECS[self.manifest.codec]
        self._calibration: dict[torch.device, dict[int, Calibration]] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """The cache's id now and, before that, at each time since it began to grow."""
        return ids_of(self._parts)

    @property
    def id(self) -> str:
        return self.ids[0]

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple[type["Cache"], tuple[Any, ...]]:
        """Open the cache anew in another process, such as a worker of a DataLoader: no open file travels."""
        return type(self), self._arguments

    def __getitem__(self, record: int) -> dict[str, Any]:
        """Return a record as a map-style data set does; see __getitems__."""
        if not -len(self) <= record < len(self):
            raise IndexError(f"{self.place} has no record {record}: they are numbered 0 to {len(self) - 1}")
        return self.__getitems__([record % len(self)])[0]

    def __getitems__(self, records: Sequence[int]) -> list[dict[str, Any]]:
        """Read a batch at once for a DataLoader.

        Each record: {"record": its number, "key": of its image, "label": negative where there is none, "features":
        {block: (N, d) float32 on the CPU}}, with "positions": (k,) of the stored patches, if only some are, and
        "pixels": (side, side, 3) uint8, if the cache holds the views.
        """
        encoded = self.read(records)
        features = self.decode(encoded, torch.device("cpu"))
        found: dict[str, Any] = {} if encoded.positions is None else {"positions": encoded.positions}
        if self.has_pixels:
            stored = self.manifest.pixels
            found["pixels"] = self.pixels(records, stored.size if stored else self.manifest.teacher.image_size)
        images = self.index.image[np.asarray(records)]
        return [
            {
                "record": int(record),
                "key": self.index.images.keys[int(image)],
                "label": int(self.index.images.labels[image]),
                "features": {block: x[n] for block, x in features.items()},
                **{name: values[n] for name, values in found.items()},
            }
            for n, (record, image) in enumerate(zip(records, images, strict=True))
        ]

    @property
    def rows(self) -> tuple[str, ...]:
        """Which images and views, in their order: equal for caches that hold the same records."""
        return tuple(span.main.rows for span in self._spans)

    @property
    def record_bytes(self) -> int:
        """Of a record's features as they are stored, without outliers, entropy coding and views."""
        forms = [form for block in self.blocks for form in self.manifest.layout(block).values() if form is not None]
        return sum(math.prod(form.shape) * np.dtype(form.dtype).itemsize for form in forms)

    @cached_property
    def index(self) -> Index:
        return join(span.main.index() for span in self._spans)

    @cached_property
    def has_pixels(self) -> bool:
        """Whether the views themselves are stored, so that students need no images."""
        return all(span.pixels is not None for span in self._spans)

    def read(self, records: Sequence[int] | np.ndarray) -> Encoded:
        """The stored form of some records on the CPU, in the order asked for."""
        groups = self._groups(records)
        blocks: dict[int, Stored] = {
            block: {
                part: self._read(groups, f"{FEATURES}/{block}/{part}", [s.blocks[block] for s in self._spans])
                for part in self.manifest.layout(block)
            }
            for block in self.blocks
        }
        if not self.manifest.sampled:
            return Encoded(blocks)
        positions = self._read(groups, POSITIONS, [s.main for s in self._spans])
        assert isinstance(positions, Tensor)
        return Encoded(blocks, positions)

    def pixels(self, records: Sequence[int] | np.ndarray, size: int, files: ImageFile | None = None) -> Tensor:
        """The views of some records at a resolution, (n, size, size, 3) uint8.

        files: where the images of `index` lie now; not needed if the cache holds the views.
        """
        if self.has_pixels:
            views = np.empty((len(records), size, size, 3), np.uint8)
            # Part by part: another teacher may have stored its views at another size, or as another kind.
            for span, rows, places in self._groups(records):
                part = self._spans[span].pixels
                assert part is not None
                stored = stored_views(self._readers[part.name].read(PIXELS, part.stored(rows)))
                for row, view in zip(places.tolist(), stored, strict=True):
                    views[row] = resize(view, size)
            return torch.from_numpy(views)
        assert files is not None
        return torch.from_numpy(views_of(files, self.index, np.asarray(records), size))

    def decode(self, encoded: Encoded, device: torch.device) -> dict[int, Tensor]:
        """{block: features (n, N, d) float32} on the device, moved there in their stored form.

        Of a cache with sampled tokens, N counts the prefix tokens and the stored patches of each record.
        """
        calibration = self._calibration_on(device)
        features = {}
        for block, parts in encoded.blocks.items():
            moved = {
                name: part.to(device) if isinstance(part, Ragged) else part.to(device, non_blocking=True)
                for name, part in parts.items()
            }
            features[block] = self._codec.decode(moved, calibration[block])
        return features

    def features(self, records: Sequence[int] | np.ndarray, device: torch.device) -> dict[int, Tensor]:
        """{block: features (n, N, d) float32} of some records."""
        return self.decode(self.read(records), device)

    def suffix(self) -> TeacherSuffix:
        """The frozen end of the teacher, on the CPU."""
        part = min(
            (p for p in self._parts if TAIL in p.manifest.files),
            key=lambda p: p.manifest.tail_first_block,
        )
        teacher, file = part.manifest.teacher, f"{part.store.url}/{TAIL}"
        state = parse_tensors(part.store.read(TAIL), file)
        try:
            return TeacherSuffix(teacher.architecture, teacher.model_args, part.manifest.tail_first_block, state)
        except RuntimeError as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None

    def _complete(self, parts: list[Segment], local_copy: Path | None) -> list[Segment]:
        """The parts without those that are still being added."""
        complete = []
        for part in parts:
            lacks = part.lacks()
            if lacks is None:
                complete.append(part)
                self._readers[part.name] = SegmentReader(part, part.files, local_copy)
            elif part.name:
                say(f"{part.store.url} is incomplete and left out; repeat its cache-teacher command with --append")
            else:
                raise UserError(f"{self.place} is incomplete: {lacks}; repeat its cache-teacher command with --resume")
        return complete

    def _find_spans(self, everything: list[Segment]) -> list[_Span]:
        spans: dict[str, dict[int, Segment]] = {}
        for part in self._parts:
            spans.setdefault(part.rows, {}).update(dict.fromkeys(part.manifest.blocks, part))
        pixels = {p.rows: p for p in everything if p.manifest.pixels is not None}
        for blocks in spans.values():
            missing = [b for b in self.blocks if b not in blocks]
            if missing:
                part = next(iter(blocks.values()))
                raise UserError(
                    f"{part.store.url} has no block {missing[0]}; add it with cache-teacher --append, or choose blocks"
                )
        return [_Span(blocks, pixels.get(rows)) for rows, blocks in spans.items()]

    def _groups(self, records: Sequence[int] | np.ndarray) -> list[_Group]:
        """Of every span, those of some records that lie in it, in the order in which they are stored."""
        chosen = np.asarray(records, dtype=np.int64)
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(wrong):
            raise UserError(f"{self.place} has no record {wrong[0]}: they are numbered 0 to {len(self) - 1}")
        order = np.argsort(chosen)
        cuts = [*np.searchsorted(chosen[order], self._starts).tolist(), len(order)]
        groups = [
            (span, chosen[order[a:b]] - start, order[a:b])
            for span, (start, a, b) in enumerate(zip(self._starts.tolist(), cuts, cuts[1:], strict=False))
        ]
        return [group for group in groups if len(group[1])] or groups[:1]

    def _read(self, groups: list[_Group], array: str, parts: list[Segment]) -> Tensor | Ragged:
        """Some records of an array that lies in one part of every span."""
        arrays = [self._readers[part.name].array(array) for part in parts]
        count = sum(len(records) for _, records, _ in groups)
        return read_arrays([(arrays[s], parts[s].stored(records), places) for s, records, places in groups], count)

    def _calibration_on(self, device: torch.device) -> dict[int, Calibration]:
        if device not in self._calibration:
            self._calibration[device] = {
                block: read_calibration(self._spans[0].blocks[block])[block].to(device) for block in self.blocks
            }
        return self._calibration[device]


def read_arrays(groups: Sequence[tuple[ShardedArray, np.ndarray, np.ndarray]], count: int) -> Tensor | Ragged:
    """Records of several arrays of one form: [(array, its records, their places among `count`)]."""
    form = groups[0][0].form
    found = [(array, array.find(records), places) for array, records, places in groups]
    if form is not None:
        out = empty((count, *form.shape), form.dtype)
        starts = np.arange(count) * groups[0][0].row
    else:
        lengths = np.empty(count, np.int64)
        for _, chunks, places in found:
            lengths[places] = chunks.lengths
        out = torch.empty(int(lengths.sum()), dtype=torch.uint8)
        starts = np.cumsum(lengths) - lengths
    flat = out.numpy().reshape(-1).view(np.uint8)
    for array, chunks, places in found:
        array.read_into(chunks, flat, starts[places])
    return out if form is not None else Ragged(out, torch.from_numpy(lengths))


def read_calibration(part: Segment) -> dict[int, Calibration]:
    """{block: calibration} of a part. Raises UserError if it is damaged."""
    file = f"{part.store.url}/{CALIBRATION}"
    tensors = parse_tensors(part.store.read(CALIBRATION), file)
    try:
        return {
            block: Calibration.from_tensors(
                {n.removeprefix(f"{block}."): t for n, t in tensors.items() if n.startswith(f"{block}.")}
            )
            for block in part.manifest.blocks
        }
    except KeyError as error:
        raise UserError(f"{file} is damaged: it has no {error}") from None
