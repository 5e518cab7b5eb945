"""What is stored of a batch: codecs, sampled patches, pixels -> the values of a part's arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration, Ragged, few_records
from pipeline.cache.extract import check_finite
from pipeline.cache.format import FEATURES, PIXELS, POSITIONS, VIEWS
from pipeline.cache.manifest import Manifest
from pipeline.cache.pixels import encode_jpegs
from pipeline.cache.reader import read_calibration
from pipeline.cache.rows import RowReader, Rows
from pipeline.cache.segments import Segment
from pipeline.data.views import draw_positions
from singer.matching import take_patches

Values = dict[str, Tensor | Ragged]


@dataclass(frozen=True)
class Batch:
    """What the teacher sees of some records, (n, size, size, 3) uint8, and what is stored beside its features.

    unreadable: {image: why it cannot be decoded}.
    """

    records: np.ndarray
    pixels: Tensor
    extra: Values
    unreadable: dict[int, str]


def calibration_on(part: Segment, device: torch.device) -> dict[int, Calibration]:
    return {block: calibration.to(device) for block, calibration in read_calibration(part).items()}


class Encoder:
    """Features and views of a batch -> the values of a part's arrays.

    calibration: of every block, on the device of the features.
    """

    def __init__(self, manifest: Manifest, rows: Rows, calibration: Mapping[int, Calibration]) -> None:
        self._manifest, self._rows = manifest, rows
        self._codec, self._calibration = CODECS[manifest.codec], calibration

    @property
    def sides(self) -> set[int]:
        """The sides of the views that are needed, in pixels: the teacher's, and that of stored views."""
        teacher, pixels = self._manifest.teacher, self._manifest.pixels
        return {teacher.image_size} | ({pixels.size} if pixels is not None else set())

    def load(self, read: RowReader, records: np.ndarray) -> Batch:
        """Decode the views, for the teacher and, at the size of stored pixels, for the students."""
        pixels, seen = self._manifest.pixels, read(records)
        extra: Values = {VIEWS: torch.from_numpy(seen.found.view(np.uint8).reshape(len(records), -1))}
        if pixels is not None:
            small = seen.pixels[pixels.size]
            extra[PIXELS] = encode_jpegs(small.numpy(), pixels.quality) if pixels.quality else small
        large = seen.pixels[self._manifest.teacher.image_size]
        return Batch(records, large, extra | self.positions(records), seen.unreadable)

    def positions(self, records: np.ndarray) -> Values:
        """Which patches of some records are stored; nothing if all are."""
        if not self._manifest.sampled:
            return {}
        seed, patches = self._manifest.views["seed"], self._manifest.teacher.patches
        drawn = [
            draw_positions(seed, self._rows.key(r), self._rows.number(r), patches, self._manifest.stored_patches)
            for r in records.tolist()
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
                check_finite({block: few}, batch.records[own], self._rows.key)
                if isinstance(positions, Tensor):
                    few = take_patches(few, self._manifest.teacher.prefix_tokens, positions[own])
                for part, values in self._codec.encode(few, self._calibration[block]).items():
                    yield f"{FEATURES}/{block}/{part}", values
