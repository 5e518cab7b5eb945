"""Reading all images of some shards as the pass that feeds the teacher does, without a teacher."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache.manifest import view_form
from pipeline.cache.rows import RowReader, Rows
from pipeline.config import ViewsConfig
from pipeline.data import ImageFile, Images, OnError
from pipeline.runtime.prefetch import prefetch


@dataclass(frozen=True)
class Validated:
    """The images that can be decoded, what was found of them, and the names of the others with the reason."""

    images: Images
    found: np.ndarray
    unreadable: dict[str, str]


def validate_images(images: Images, workers: int, on_error: OnError) -> Validated:
    rows = Rows(images, 0, 1, ViewsConfig())
    with ImageFile(images) as files:
        read = RowReader(rows, files, view_form(False), {4}, on_error)
        seen = list(prefetch(read, np.array_split(np.arange(len(images)), -(-len(images) // 8)), workers))
    found = np.concatenate([s.found for s in seen])
    broken = {images.keys[n]: reason for s in seen for n, reason in s.unreadable.items()}
    good = np.flatnonzero(found["width"])
    return Validated(images.select(good), found[good], broken)
