"""Compute what a segment stores of a batch: encoded features, views, positions of sampled patches, and pixels."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import CODECS, naming_block
from pipeline.cache.extract import check_finite
from pipeline.cache.format import FEATURES, PIXELS, POSITIONS, VIEWS
from pipeline.cache.manifest import Manifest
from pipeline.cache.pixels import encode_jpegs
from pipeline.cache.rows import RowReader, Rows, ViewBatch
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import Segment
from pipeline.cache.stored import Ragged, Stored
from pipeline.data.views import draw_positions
from singer.sizes import ImageSize
from singer.tokens import take_patches


def calibration_on(segment: Segment, device: torch.device) -> dict[int, Calibration]:
    """Read {block: calibration} of a segment and move it to a device."""
    return {block: calibration.to(device) for block, calibration in read_calibration(segment).items()}


class Encoder:
    """Turn the features and views of a batch into the values of a segment's arrays.

    calibration: {block: its calibration}, on the device of the features.
    """

    def __init__(self, manifest: Manifest, rows: Rows, calibration: Mapping[int, Calibration]) -> None:
        self._manifest, self._rows = manifest, rows
        self._codec, self._calibration = CODECS[manifest.codec], calibration

    @property
    def sizes(self) -> set[ImageSize]:
        """Return the sizes of the views that are needed, in pixels: the teacher's, and that of stored views."""
        teacher, pixels = self._manifest.teacher, self._manifest.pixels
        return {teacher.image_size} | ({pixels.size} if pixels is not None else set())

    def load(self, read: RowReader, records: np.ndarray) -> ViewBatch:
        """Read the views of some records, with what is stored beside their features."""
        pixels, batch = self._manifest.pixels, read(records)
        beside: Stored = {VIEWS: torch.from_numpy(batch.found.view(np.uint8).reshape(len(records), -1))}
        if pixels is not None:
            small = batch.pixels[pixels.size]
            beside[PIXELS] = encode_jpegs(small.numpy(), pixels.quality) if pixels.quality else small
        return replace(batch, beside=beside | self.positions(records))

    def positions(self, records: np.ndarray) -> Stored:
        """Return the numbers of the stored patches of some records as values; return no values if all are stored."""
        if not self._manifest.sampled:
            return {}
        seed, patches = self._manifest.views["seed"], self._manifest.teacher.patches
        drawn = [
            draw_positions(seed, self._rows.key(r), self._rows.number(r), patches, self._manifest.stored_patches)
            for r in records.tolist()
        ]
        return {POSITIONS: torch.from_numpy(np.stack(drawn))}

    def __call__(self, features: dict[int, Tensor], batch: ViewBatch) -> Iterator[tuple[str, Tensor | Ragged]]:
        """Yield (array, its values of some records); the values of each array are in the order of the records.

        Raises UserError naming the image's key for a NaN or Inf.
        """
        yield from batch.beside.items()
        positions = batch.beside.get(POSITIONS)
        for block, x in features.items():
            done = 0
            for few in few_records(x):
                own = slice(done, done := done + len(few))
                check_finite({block: few}, batch.records[own], self._rows.key)
                if isinstance(positions, Tensor):
                    few = take_patches(few, self._manifest.teacher.prefix_tokens, positions[own])
                with naming_block(block):
                    stored = self._codec.encode(few, self._calibration[block])
                for part, values in stored.items():
                    yield f"{FEATURES}/{block}/{part}", values
