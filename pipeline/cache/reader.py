"""Read a cache: batches of records in any order, decoded on the training device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pipeline.cache.codecs import CODECS, Decoder
from pipeline.cache.format import FEATURES, PIXELS, POSITIONS, TAIL
from pipeline.cache.index import Index, join
from pipeline.cache.pixels import resize, stored_views, views_of
from pipeline.cache.segment_reader import SegmentReader, read_calibration
from pipeline.cache.segments import Segment, read_segments
from pipeline.cache.stored import Encoded, Stored
from pipeline.cache.variants import check_held_once, choose_variant, ids_of
from pipeline.cache.zarr_shards import ZarrArray, read_arrays
from pipeline.config import LocalCopy, TeacherConfig, read_dumped
from pipeline.data import ImageFile
from pipeline.outputs.resuming import CONFIG
from pipeline.runtime.buffers import empty, moved
from pipeline.runtime.progress import say
from pipeline.storage import Place, open_store
from pipeline.storage.tensors import parse_tensors
from singer.errors import UserError
from singer.sizes import ImageSize, Size
from singer.suffix import NO_SUFFIX, TeacherSuffix


@dataclass(frozen=True)
class _Span:
    """Records that were added together: the segment that holds each block, and the one that stores their views."""

    blocks: dict[int, Segment]
    pixels: Segment | None

    @property
    def main(self) -> Segment:
        """Return the segment that says which images and views the records are."""
        return next(iter(self.blocks.values()))


_Group = tuple[_Span, np.ndarray, np.ndarray]
"""A span, records within it, and their places among all requested records."""


class Cache:
    """A complete cache, opened for reading. It is safe to share between threads.

    place: a folder or a URL. teacher: the teacher to read if the cache has several: a variant
    (manifest.teacher.variant), or a name, an architecture or the beginning of the weights' hash that fits only one
    variant; default: the first teacher. blocks: the blocks to read; default: all. local_copy: a folder to which shards
    are copied when they are first read, perhaps with a limit in GB. known: the id by which a refiner or a run knows the
    cache; it selects that variant if the cache has it. option: the option that names a variant, for the message, with
    {} for the name. Raises UserError if there is no cache, if Zarr shards are missing, if several variants fit, or if
    records lack a block.
    """

    def __init__(
        self,
        place: Place,
        teacher: str | None = None,
        blocks: Sequence[int] | None = None,
        local_copy: Path | LocalCopy | None = None,
        known: str | None = None,
        option: str = "teacher={}",
    ) -> None:
        self.place = place
        self._arguments = (place, teacher, blocks, local_copy, known, option)
        self._readers: dict[str, SegmentReader] = {}
        copies = LocalCopy(local_copy) if isinstance(local_copy, Path) else local_copy
        segments = self._complete(read_segments(open_store(place)), copies)
        self._segments = choose_variant(segments, place, teacher, known, option)
        check_held_once(self._segments)
        self.manifest = self._segments[0].manifest
        if blocks is not None and len(set(blocks)) != max(1, len(blocks)):
            raise UserError(f"blocks must be one or more distinct numbers, not {list(blocks)}")
        held = sorted({b for s in self._segments for b in s.manifest.blocks})
        self.blocks = tuple(held if blocks is None else sorted(blocks))
        self._spans = self._find_spans(segments)
        counts = [s.main.records for s in self._spans]
        self._starts, self._count = np.cumsum([0, *counts])[:-1], sum(counts)
        self._codec = CODECS[self.manifest.codec]
        self._decoders: dict[torch.device, Decoder] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """Return the id of the cache now, then its earlier ids: it gets a new one with each appended segment."""
        return ids_of(self._segments)

    @property
    def id(self) -> str:
        """Return the id of the cache as it is now."""
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
        "pixels": (height, width, 3) uint8, if the cache holds the views.
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
    def records_key(self) -> tuple[str, ...]:
        """Return texts for the images and views, in order; they are equal for caches that hold the same records."""
        return tuple(span.main.records_key for span in self._spans)

    @property
    def record_bytes(self) -> int:
        """Return the stored size of a record's features in bytes, without outliers and views."""
        forms = [form for block in self.blocks for form in self.manifest.layout(block).values() if form is not None]
        return sum(math.prod(form.shape) * np.dtype(form.dtype).itemsize for form in forms)

    @cached_property
    def index(self) -> Index:
        """Return the image and the view of every record."""
        return join(span.main.index() for span in self._spans)

    @cached_property
    def has_pixels(self) -> bool:
        """Return whether the views themselves are stored, so that students need no images."""
        return all(span.pixels is not None for span in self._spans)

    def smaller_views(self, size: ImageSize) -> Size | None:
        """Return the size of stored views that `pixels` would enlarge to this size; None if it enlarges none."""
        manifests = [span.pixels.manifest.pixels for span in self._spans if span.pixels is not None]
        stored = [Size.of(pixels.size) for pixels in manifests if pixels is not None]
        wanted = Size.of(size)
        return next((one for one in stored if one.height < wanted.height or one.width < wanted.width), None)

    def read(self, records: Sequence[int] | np.ndarray) -> Encoded:
        """Read some records in their stored form, on the CPU and in the given order."""
        groups, blocks = self._groups(records), dict[int, Stored]()
        for block in self.blocks:
            held = [(s := span.blocks[block], s.stored(rows), places) for span, rows, places in groups]
            names = {part: f"{FEATURES}/{block}/{part}" for part in self.manifest.layout(block)}
            blocks[block] = {
                part: read_arrays([(self._array(s, name), rows, places) for s, rows, places in held], len(records))
                for part, name in names.items()
            }
        if not self.manifest.sampled:
            return Encoded(blocks)
        mains = [(self._array(s := span.main, POSITIONS), s.stored(rows), places) for span, rows, places in groups]
        positions = read_arrays(mains, len(records))
        assert isinstance(positions, Tensor)
        return Encoded(blocks, positions)

    def pixels(self, records: Sequence[int] | np.ndarray, size: ImageSize, files: ImageFile | None = None) -> Tensor:
        """Return the views of some records at a resolution, (n, height, width, 3) uint8.

        size: the side of a square, or (height, width); files: the images of `index`, where they are now; not needed if
        the cache holds the views.
        """
        if self.has_pixels:
            out = empty((len(records), *Size.of(size), 3), "uint8")
            views = out.numpy()
            # Views are read segment by segment because segments may store them at different sizes or as other kinds.
            for span, rows, places in self._groups(records):
                segment = span.pixels
                assert segment is not None
                stored = stored_views(self._readers[segment.name].read(PIXELS, segment.stored(rows)))
                for row, view in zip(places.tolist(), stored, strict=True):
                    views[row] = resize(view, size)
            return out
        assert files is not None
        return views_of(files, self.index, np.asarray(records), size)

    def decode(self, encoded: Encoded, device: torch.device) -> dict[int, Tensor]:
        """Return {block: features (n, N, d) float32} on the device; they are moved there in their stored form.

        In a cache with sampled tokens, N is the number of the prefix tokens and the stored patches of each record.
        """
        return self.decoder(device)(encoded.map(partial(moved, device=device))).blocks

    def decoder(self, device: torch.device) -> Decoder:
        """Return what decodes records that are on a device, with this cache's calibration on it."""
        if device not in self._decoders:
            self._decoders[device] = Decoder(
                self._codec,
                {b: read_calibration(self._spans[0].blocks[b])[b].to(device) for b in self.blocks},
            )
        return self._decoders[device]

    def features(self, records: Sequence[int] | np.ndarray, device: torch.device) -> dict[int, Tensor]:
        """Read and decode some records: {block: features (n, N, d) float32}."""
        return self.decode(self.read(records), device)

    def suffix(self) -> TeacherSuffix:
        """Return the frozen suffix of the teacher, on the CPU.

        Raises UserError if the teacher has none, or if its file is damaged.
        """
        if not self.has_suffix:
            raise UserError(f"{self.manifest.teacher.architecture}: {NO_SUFFIX}")
        segment = min(
            (s for s in self._segments if TAIL in s.manifest.files),
            key=lambda s: s.manifest.tail_first_block,
        )
        teacher, file = segment.manifest.teacher, f"{segment.store.url}/{TAIL}"
        state = parse_tensors(segment.store.read(TAIL), file)
        try:
            return TeacherSuffix(teacher.architecture, teacher.model_args, segment.manifest.tail_first_block, state)
        except RuntimeError as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None

    def teacher_config(self, weights: Path | None = None) -> TeacherConfig:
        """Return how to load the teacher as it was when it was cached. weights: where they are now, if they moved."""
        teacher = self.manifest.teacher
        try:
            told = read_dumped(self._segments[0].store.read(CONFIG))["teacher"]
            config = TeacherConfig.model_validate(told)
        except (FileNotFoundError, yaml.YAMLError, LookupError, TypeError, ValueError):
            config = TeacherConfig(name=teacher.name, image_size=teacher.image_size)
        return config if weights is None else config.model_copy(update={"weights": weights})

    @property
    def has_suffix(self) -> bool:
        """Return whether the teacher's blocks after the cached ones can be run."""
        return any(TAIL in s.manifest.files for s in self._segments)

    def _complete(self, segments: list[Segment], local_copy: LocalCopy | None) -> list[Segment]:
        """Return the complete segments. Raises UserError if the first one is incomplete; others are left out."""
        complete = []
        for segment in segments:
            lacks = segment.lacks()
            if lacks is None:
                complete.append(segment)
                self._readers[segment.name] = SegmentReader(segment, segment.files, local_copy)
            elif segment.name:
                say(f"{segment.store.url} is incomplete and left out; repeat its cache-teacher command with --append")
            else:
                raise UserError(f"{self.place} is incomplete: {lacks}; repeat its cache-teacher command with --resume")
        return complete

    def _find_spans(self, everything: list[Segment]) -> list[_Span]:
        """Group the segments of this teacher by their records. everything: those of all teachers, for stored views."""
        spans: dict[str, dict[int, Segment]] = {}
        for segment in self._segments:
            spans.setdefault(segment.records_key, {}).update(dict.fromkeys(segment.manifest.blocks, segment))
        pixels = {s.records_key: s for s in everything if s.manifest.pixels is not None}
        for blocks in spans.values():
            missing = [b for b in self.blocks if b not in blocks]
            if missing:
                url = next(iter(blocks.values())).store.url
                raise UserError(
                    f"{url} has no block {missing[0]}; add it with cache-teacher --append, or choose blocks"
                )
        return [_Span(blocks, pixels.get(rows)) for rows, blocks in spans.items()]

    def _groups(self, records: Sequence[int] | np.ndarray) -> list[_Group]:
        """Group some records by span; within a group, they are in the order in which they are stored."""
        chosen = np.asarray(records, dtype=np.int64)
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(wrong):
            raise UserError(f"{self.place} has no record {wrong[0]}: they are numbered 0 to {len(self) - 1}")
        order = np.argsort(chosen)
        cuts = [*np.searchsorted(chosen[order], self._starts).tolist(), len(order)]
        groups = [
            (span, chosen[order[a:b]] - start, order[a:b])
            for span, start, a, b in zip(self._spans, self._starts.tolist(), cuts[:-1], cuts[1:], strict=True)
        ]
        return [group for group in groups if len(group[1])] or groups[:1]

    def _array(self, segment: Segment, name: str) -> ZarrArray:
        """Return an array of a segment by its name."""
        return self._readers[segment.name].array(name)
