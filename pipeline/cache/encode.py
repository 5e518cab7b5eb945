"""Compute what a segment stores of a batch: its encoded features, and what was found when it was read."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import CODECS, naming_block
from pipeline.cache.extract import check_finite
from pipeline.cache.format import FEATURES, POSITIONS
from pipeline.cache.manifest import Manifest
from pipeline.cache.rows import Rows, ViewBatch
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import Segment
from pipeline.cache.stored import Ragged
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
