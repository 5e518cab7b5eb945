"""What is stored of a batch: codecs, sampled patches, pixels -> the values of a part's arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration, Ragged, few_records
from pipeline.cache.format import FEATURES, PIXELS, POSITIONS, Index, Manifest
from pipeline.cache.parts import Part
from pipeline.cache.pixels import encode_jpegs, views_of
from pipeline.cache.reader import read_calibration
from pipeline.extract import check_finite
from pipeline.shards import ImageFile
from pipeline.views import draw_positions
from singer.matching import take_patches

Values = dict[str, Tensor | Ragged]


@dataclass(frozen=True)
class Batch:
    """What the teacher sees of some records, (n, size, size, 3) uint8, and what is stored beside its features."""

    records: np.ndarray
    pixels: Tensor
    extra: Values


def calibration_on(part: Part, device: torch.device) -> dict[int, Calibration]:
    return {block: calibration.to(device) for block, calibration in read_calibration(part).items()}


class Encoder:
    """Features and views of a batch -> the values of a part's arrays.

    calibration: of every block, on the device of the features.
    """

    def __init__(self, manifest: Manifest, index: Index, calibration: Mapping[int, Calibration]) -> None:
        self._manifest, self._index = manifest, index
        self._codec, self._calibration = CODECS[manifest.codec], calibration

    def load(self, files: ImageFile, records: np.ndarray) -> Batch:
        """Decode the views, once for the teacher and, at the size of stored pixels, once for the students."""
        teacher, pixels = self._manifest.teacher, self._manifest.pixels
        views = views_of(files, self._index, records, teacher.image_size)
        extra: Values = {}
        if pixels is not None:
            same = pixels.size == teacher.image_size
            small = views if same else views_of(files, self._index, records, pixels.size)
            extra[PIXELS] = encode_jpegs(small, pixels.quality) if pixels.quality else torch.from_numpy(small)
        return Batch(records, torch.from_numpy(views), extra | self.positions(records))

    def positions(self, records: np.ndarray) -> Values:
        """Which patches of some records are stored; nothing if all are."""
        if not self._manifest.sampled:
            return {}
        seed, patches = self._manifest.views["seed"], self._manifest.teacher.patches
        drawn = [
            draw_positions(seed, self._index.key(r), int(self._index.view[r]), patches, self._manifest.stored_patches)
            for r in records
        ]
        return {POSITIONS: torch.from_numpy(np.stack(drawn))}

    def __call__(self, features: dict[int, Tensor], batch: Batch) -> Iterator[tuple[str, Tensor | Ragged]]:
        """(array, its values of some records), each array's in the order of the records.

        Raises UserError naming the key for a NaN or Inf.
        """
        yield from batch.extra.items()
        positions = batch.extra.get(POSITIONS)
        for block, x in features.items():
            done = 0
            for few in few_records(x):
                own = slice(done, done := done + len(few))
                check_finite({block: few}, batch.records[own], self._index)
                if isinstance(positions, Tensor):
                    few = take_patches(few, self._manifest.teacher.prefix_tokens, positions[own])
                for part, values in self._codec.encode(few, self._calibration[block]).items():
                    yield f"{FEATURES}/{block}/{part}", values
