"""Batches: read as they are stored, moved to the device in that form, and decoded there."""

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.stored import Encoded
from pipeline.data import ImageFile
from pipeline.data.sampler import BatchIndices, part_size
from pipeline.data.views import normalise
from pipeline.models.backbone import Backbone
from pipeline.runtime.buffers import moved
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Meter
from pipeline.training.other_views import OtherViews
from singer.sizes import ImageSize, Size


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's part of a batch on the device.

    features: {block: (B, N, d)}, as the teacher computed them; positions: (B, k), those of sampled patches. Where other
    views teach (Batch.places), their features follow as B further records.
    """

    features: dict[int, Tensor]
    positions: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> "TeacherFeatures":
        """Return the features of some records of the batch."""
        positions = self.positions[rows] if self.positions is not None else None
        return TeacherFeatures({b: x[rows] for b, x in self.features.items()}, positions)


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    images: (B, 3, H, W); teacher_features: those of each teacher, which the model decodes if they are in their stored
    form, so that a compiled step does that together with all that follows; weights: (B,), the weight of each record in
    the mean; labels: (B,), negative where there is none, or (B, classes), shares of classes; filling: how many records
    at the end only fill up and have weight 0; places: (B, 2, 5), where each view is, and the other one whose patches
    teach it (distill.overlap); None if each teaches itself.
    """

    images: Tensor
    teacher_features: Sequence[TeacherFeatures | Encoded]
    weights: Tensor
    labels: Tensor
    filling: int = 0
    places: Tensor | None = None

    def split(self, parts: int) -> Iterator["Batch"]:
        """Split a batch with decoded features into `parts` parts, or fewer if there are not enough records."""
        if parts == 1:
            yield self
            return
        count = len(self.weights)
        size, real = part_size(count, parts), count - self.filling
        decoded = [features for features in self.teacher_features if isinstance(features, TeacherFeatures)]
        assert len(decoded) == len(self.teacher_features), "what is stored cannot be split on a device"
        for start in range(0, count, size):
            rows = slice(start, start + size)
            filling = min(start + size, count) - max(start, min(start + size, real))
            places = None if self.places is None else self.places[rows]
            read = rows if places is None else torch.arange(2 * count).view(2, -1)[:, rows].flatten()
            features = [s.rows(read) for s in decoded]
            yield Batch(self.images[rows], features, self.weights[rows], self.labels[rows], filling, places)


@dataclass(frozen=True)
class StoredBatch:
    """What one process trains on in one step, as it was read.

    pixels: {size: (n, height, width, 3) uint8}; encoded: the features of each teacher; weights: (n,), the weight of
    each record in the mean; labels: (n,) int64, negative where there is none; filling, places: as in Batch; step: its
    number in the whole training.
    """

    pixels: dict[ImageSize, Tensor]
    encoded: Sequence[Encoded]
    weights: Tensor
    labels: Tensor
    filling: int = 0
    places: Tensor | None = None
    step: int = 0

    def to(self, device: torch.device) -> "StoredBatch":
        """Copy everything to a device in its stored form, as `moved` does."""
        return StoredBatch(
            {size: moved(pixels, device) for size, pixels in self.pixels.items()},
            [encoded.to(device) for encoded in self.encoded],
            moved(self.weights, device),
            moved(self.labels, device),
            self.filling,
            None if self.places is None else moved(self.places, device),
            self.step,
        )

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over all tensors."""
        yield from (*self.pixels.values(), self.weights, self.labels)
        if self.places is not None:
            yield self.places
        for encoded in self.encoded:
            yield from encoded.tensors()

    def batches(self, caches: Sequence[Cache], students: Sequence[Backbone]) -> list[Batch]:
        """Return a Batch for every student; the batch must be on the device. Equal inputs are shared by students.

        The features are decoded here if several students share them. A single student decodes them itself.
        """
        device = self.weights.device
        features: Sequence[TeacherFeatures | Encoded] = self.encoded
        if len(students) > 1:
            pairs = zip(caches, self.encoded, strict=True)
            features = [TeacherFeatures(cache.decoder(device)(x), x.positions) for cache, x in pairs]
        keys = [(s.image_size, s.mean, s.std) for s in students]
        images = {(size, mean, std): normalise(self.pixels[size], mean, std, device) for size, mean, std in set(keys)}
        return [Batch(images[key], features, self.weights, self.labels, self.filling, self.places) for key in keys]


class Loader(Protocol):
    """Loads batches of what a stage trains on; its length is the number of records."""

    def __len__(self) -> int: ...

    @property
    def record_bytes(self) -> int:
        """Return how many bytes are read for a record, besides its image."""

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[StoredBatch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead."""

    def batches(self, stored: StoredBatch, students: Sequence[Backbone]) -> list[Batch]:
        """Return a Batch on the device for every student, of a stored one that is there."""


class BatchLoader:
    """Load batches: the views of records at the students' resolutions, and their stored features.

    caches: of the same records; views and labels come from the first. files: the images of the first cache, None if the
    cache holds the views; sizes: those of the students' images, in pixels; records: those of the cache that are loaded,
    and then have the numbers from 0 on; default: all; others: chooses the view that teaches each record; None: its own.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        files: ImageFile | None,
        sizes: Sequence[ImageSize],
        records: np.ndarray | None = None,
        others: OtherViews | None = None,
    ) -> None:
        self.others = others
        self.caches, self.files, self.sizes, self.records = caches, files, sorted(set(sizes), key=Size.of), records
        index = caches[0].index
        self.labels = torch.from_numpy(index.images.labels[index.image])

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.caches[0]) if self.records is None else len(self.records)

    def _stored(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers that records have in the cache."""
        return numbers if self.records is None else self.records[numbers]

    @property
    def record_bytes(self) -> int:
        """Return the stored size of the features that are read for a record, from all caches, in bytes."""
        return sum(cache.record_bytes for cache in self.caches) * (1 if self.others is None else 2)

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[StoredBatch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead.

        Images are read batch by batch, and the features of a list in one piece. most: how many lists of features are
        read ahead; default: as many as batches of images.
        """
        lists, again = itertools.tee(lists)
        images = prefetch(self.pixels, itertools.chain.from_iterable(lists), workers, meter)
        features = prefetch(self.features, again, workers, meter, most)
        with closing(images), closing(features):
            for (indices, pixels), encoded in zip(images, itertools.chain.from_iterable(features), strict=True):
                labels = self.labels[torch.from_numpy(self._stored(indices.records))].long()
                filling = int((indices.weights == 0).sum())
                weights = torch.from_numpy(indices.weights)
                places = None if self.others is None else self.others.places(*np.split(self._read(indices), 2))
                yield StoredBatch(pixels, encoded, weights, labels, filling, places, indices.step)

    def batches(self, stored: StoredBatch, students: Sequence[Backbone]) -> list[Batch]:
        """Return a Batch on the device for every student, of a stored one that is there."""
        return stored.batches(self.caches, students)

    def pixels(self, share: BatchIndices) -> tuple[BatchIndices, dict[ImageSize, Tensor]]:
        """Return the batch indices, and the views of their records, {size: (n, height, width, 3) uint8}."""
        return share, {
            size: self.caches[0].pixels(self._stored(share.records), size, self.files) for size in self.sizes
        }

    def features(self, shares: Sequence[BatchIndices]) -> list[list[Encoded]]:
        """Read the stored features of several batches in one piece: for each batch, one entry for each cache."""
        read = [self._read(share) for share in shares]
        records, counts = np.concatenate(read), [len(one) for one in read]
        return [list(batch) for batch in zip(*(c.read(records).split(counts) for c in self.caches), strict=True)]

    def _read(self, share: BatchIndices) -> np.ndarray:
        """Return the records whose features are read for a batch: its own, and then those of their other views."""
        own = self._stored(share.records)
        return own if self.others is None else np.concatenate([own, self.others.choose(own, share.epoch)])
