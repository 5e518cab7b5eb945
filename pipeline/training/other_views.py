"""Choose another stored view of the same image for each record, whose patches are its targets (distill.overlap)."""

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from singer.errors import UserError

_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15)


class OtherViews:
    """The views of each image in a cache. Raises UserError if an image has one view only.

    Images are the same if their files have the same digest, in whatever segment their views are.
    """

    def __init__(self, cache: Cache, seed: int) -> None:
        index, self._seed = cache.index, seed
        edges = np.column_stack([index.box, index.flip]).astype(np.float32)
        self._edges = torch.from_numpy(edges)
        _, image, counts = np.unique(index.digest[index.image], return_inverse=True, return_counts=True)
        if counts.min() < 2:
            record = int(np.flatnonzero(counts[image] < 2)[0])
            remedy = "--append --views 2"
            if cache.manifest.views["kind"] == "center":
                remedy = "--views 2 --set views.kind=random-resized-crop, in a new cache"
            raise UserError(
                f"distill.overlap: {cache.place} has one view of image {index.key(record)!r}, and a target needs "
                f"another one; make some with cache-teacher {remedy}, or set distill.overlap=false"
            )
        # The records image by image; where those of each record's image begin, how many they are, and its place there.
        self._order = np.argsort(image, kind="stable")
        self._start, self._count = (np.cumsum(counts) - counts)[image], counts[image]
        self._rank = np.empty(len(image), np.int64)
        self._rank[self._order] = np.arange(len(image))
        self._rank -= self._start

    def choose(self, records: np.ndarray, epoch: int) -> np.ndarray:
        """Return another view of the image of each record: a pure function of (seed, epoch, record)."""
        count = self._count[records]
        step = 1 + (_mixed(self._seed, epoch, records) % (count - 1).astype(np.uint64)).astype(np.int64)
        found: np.ndarray = self._order[self._start[records] + (self._rank[records] + step) % count]
        return found

    def places(self, records: np.ndarray, others: np.ndarray) -> Tensor:
        """Return where both views of each pair are, (n, 2, 5), as singer.overlap.resample_overlap takes it."""
        return torch.stack([self._edges[torch.from_numpy(both)] for both in (records, others)], 1)


def _mixed(seed: int, epoch: int, records: np.ndarray) -> np.ndarray:
    """Mix numbers to uint64 that look random (the finaliser of SplitMix64)."""
    x = records.astype(np.uint64)
    for number in (seed, epoch):
        x = x + np.uint64((number + 1) * _MIX[2] % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
        x = x ^ (x >> np.uint64(31))
    return x
