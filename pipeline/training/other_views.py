"""Choose the other stored views of the same image that teach the patches of each record (distill.overlap)."""

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from singer.errors import UserError

# Each view costs as much to read and to refine as the first one. Four halve noise; to halve it again takes sixteen.
_MOST_AVERAGED = 4
# Where a view is that shows no place of its image.
_NOWHERE = torch.tensor([2.0, 2.0, 3.0, 3.0, 0.0])
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15)


class OtherViews:
    """The views of each image in a cache. Raises UserError if an image has too few of them.

    Images are the same if their files have the same digest, in whatever segment their views are. average: whether the
    targets are means over several views, and not patches of another one; for these, it is enough if some image has a
    second view. views: how many views of each image are read, with the record's own.
    """

    def __init__(self, cache: Cache, seed: int, average: bool = False) -> None:
        index, self._seed, self.average = cache.index, seed, average
        edges = np.column_stack([index.box, index.flip]).astype(np.float32)
        self._edges = torch.from_numpy(edges)
        _, image, counts = np.unique(index.first_image, return_inverse=True, return_counts=True)
        few = np.full(len(image), not index.view.any()) if average else counts[image] < 2
        if few.any():
            remedy = "--append --views 2"
            if cache.manifest.views["kind"] == "center":
                remedy = "--views 2 --set views.kind=random-resized-crop, in a new cache"
            raise UserError(
                f"distill.overlap: {cache.place} has one view of image {index.key(int(few.argmax()))!r}, and a target "
                f"needs another one; make some with cache-teacher {remedy}, or set distill.overlap=none"
            )
        # By the numbers of views, and not by the counts, which are larger where files have copies.
        self.views = min(_MOST_AVERAGED, 1 + int(index.view.max())) if average else 2
        # The records image by image; where those of each record's image begin, how many they are, and its place there.
        self._order = np.argsort(image, kind="stable")
        self._start, self._count = (np.cumsum(counts) - counts)[image], counts[image]
        self._rank = np.empty(len(image), np.int64)
        self._rank[self._order] = np.arange(len(image))
        self._rank -= self._start

    def choose(self, records: np.ndarray, epoch: int) -> np.ndarray:
        """Return other views of the image of each record, (views - 1, n): a pure function of (seed, epoch, record).

        They are different ones; if there are too few, the record itself stands for each that is missing.
        """
        others = self._count[records] - 1
        number, among = np.arange(self.views - 1)[:, None], np.maximum(others, 1)
        first = (_mixed(self._seed, epoch, records) % among.astype(np.uint64)).astype(np.int64)
        step = np.where(number < others, 1 + (first + number) % among, 0)
        found: np.ndarray = self._order[self._start[records] + (self._rank[records] + step) % (others + 1)]
        return found

    def places(self, records: np.ndarray, others: np.ndarray) -> Tensor:
        """Return where the views are, (n, views, 5), as singer.overlap takes it; missing ones show no place.

        others: what `choose` returned.
        """
        found = self._edges[torch.from_numpy(np.concatenate([records[None], others]))]
        found[1:][torch.from_numpy(others == records)] = _NOWHERE
        return found.transpose(0, 1).contiguous()


def _mixed(seed: int, epoch: int, records: np.ndarray) -> np.ndarray:
    """Mix numbers to uint64 that look random (the finaliser of SplitMix64)."""
    x = records.astype(np.uint64)
    for number in (seed, epoch):
        x = x + np.uint64((number + 1) * _MIX[2] % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
        x = x ^ (x >> np.uint64(31))
    return x
