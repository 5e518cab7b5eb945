"""Batches: read as they are stored, moved to the device in that form, and decoded in the step."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.stored import Decoded, Encoded
from pipeline.data import ImageFile
from pipeline.data.sampler import BatchIndices, part_size
from pipeline.runtime.prefetch import prefetch
from pipeline.runtime.progress import Meter
from pipeline.training.other_views import OtherViews
from singer.sizes import ImageSize, Size


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step.

    pixels: {size: (n, height, width, 3)}, 0 to 255, at the image size of every student, uint8 unless they are mixed;
    features: those of each teacher, as they are stored until a step decodes them; weights: (n,), the weight of each
    record in the mean; labels: (n,) int64, negative where there is none, or (n, classes), shares of classes; filling:
    how many records at the end only fill up and have weight 0; places: (n, V, 5), where each view is, and the others
    that teach it (distill.overlap), None if each teaches itself: the features of the first other views follow as n
    further records, then those of the second, and so on; average: whether the targets are means over all of these
    views, and not patches of the one other; step: its number in the whole training.
    """

    pixels: dict[ImageSize, Tensor]
    features: Sequence[Encoded | Decoded]
    weights: Tensor
    labels: Tensor
    filling: int = 0
    places: Tensor | None = None
    average: bool = False
    step: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with every tensor changed, such as moved to a device."""
        return replace(
            self,
            pixels={size: change(pixels) for size, pixels in self.pixels.items()},
            features=[of_teacher.map(change) for of_teacher in self.features],
            weights=change(self.weights),
            labels=change(self.labels),
            places=None if self.places is None else change(self.places),
        )

    def split(self, parts: int) -> Iterator["Batch"]:
        """Split a batch with decoded features into `parts` parts, or fewer if there are not enough records."""
        assert all(isinstance(of_teacher, Decoded) for of_teacher in self.features)
        count = len(self.weights)
        size, real = part_size(count, parts), count - self.filling
        for start in range(0, count, size):
            rows = slice(start, start + size)
            filling = min(start + size, count) - max(start, min(start + size, real))
            part = replace(self, filling=filling).map(itemgetter(rows))
            if self.places is not None:
                features = [
                    of_teacher.map(partial(_of_each, views=self.places.shape[1], rows=rows))
                    for of_teacher in self.features
                ]
                part = replace(part, features=features)
            yield part


def _of_each(x: Tensor, views: int, rows: slice) -> Tensor:
    """Return some of the views, with the other ones of their images; x: (views · n, ...), first their own.

    A slice is a view on the device; numbers of rows would be copied there, and the CPU would wait.
    """
    of_views: Tensor = x.unflatten(0, (views, -1))
    return of_views[:, rows].flatten(0, 1)


class Loader(Protocol):
    """Loads batches of what a stage trains on; its length is the number of records."""

    def __len__(self) -> int: ...

    @property
    def record_bytes(self) -> int:
        """Return how many bytes are read for a record, besides its image."""

    @property
    def image_numbers(self) -> np.ndarray:
        """Return the number of the image of each record, (n,)."""

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead."""


class BatchLoader:
    """Load batches: the views of records at the students' resolutions, and their stored features.

    caches: of the same records; views and labels come from the first. files: the images of the first cache, None if the
    cache holds the views; sizes: those of the students' images, in pixels; records: those of the cache that are loaded,
    and then have the numbers from 0 on; default: all; others: chooses the other views that teach each record; None: no
    others do.
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
    def image_numbers(self) -> np.ndarray:
        """Return the number of the image of each record, (n,)."""
        images = self.caches[0].index.first_image
        return images if self.records is None else images[self.records]

    @property
    def record_bytes(self) -> int:
        """Return the stored size of the features that are read for a record, from all caches, in bytes."""
        return sum(cache.record_bytes for cache in self.caches) * (1 if self.others is None else self.others.views)

    def __call__(
        self, lists: Iterable[Sequence[BatchIndices]], workers: int, meter: Meter | None = None, most: int | None = None
    ) -> Generator[Batch, None, None]:
        """Yield the batches of all lists of batch indices; background workers read ahead.

        Images are read batch by batch, and the features of a list in one piece. most: how many lists of features are
        read ahead; default: as many as batches of images.
        """
        lists, again = itertools.tee(lists)
        images = prefetch(self.pixels, itertools.chain.from_iterable(lists), workers, meter)
        features = prefetch(self.features, again, workers, meter, most)
        with closing(images), closing(features):
            for (indices, pixels), encoded in zip(images, itertools.chain.from_iterable(features), strict=True):
                own = self._stored(indices.records)
                labels = self.labels[torch.from_numpy(own)].long()
                filling = int((indices.weights == 0).sum())
                weights = torch.from_numpy(indices.weights)
                batch = Batch(pixels, encoded, weights, labels, filling, step=indices.step)
                if self.others is not None:
                    places = self.others.places(own, self.others.choose(own, indices.epoch))
                    batch = replace(batch, places=places, average=self.others.average)
                yield batch

    def pixels(self, indices: BatchIndices) -> tuple[BatchIndices, dict[ImageSize, Tensor]]:
        """Return the batch indices, and the views of their records, {size: (n, height, width, 3) uint8}."""
        return indices, {
            size: self.caches[0].pixels(self._stored(indices.records), size, self.files) for size in self.sizes
        }

    def features(self, batches: Sequence[BatchIndices]) -> list[list[Encoded]]:
        """Read the stored features of several batches in one piece: for each batch, one entry for each cache.

        Those of other views, if there are any, follow those of its own.
        """
        read = [self._stored(indices.records) for indices in batches]
        if self.others is not None:
            read = [
                np.concatenate([own, self.others.choose(own, indices.epoch).ravel()])
                for own, indices in zip(read, batches, strict=True)
            ]
        records, counts = np.concatenate(read), [len(one) for one in read]
        return [list(batch) for batch in zip(*(c.read(records).split(counts) for c in self.caches), strict=True)]
