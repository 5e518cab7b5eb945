"""Reading a cache: batches of records in any order, decoded on the training device."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from pipeline.cache.codecs import CODECS, Calibration
from pipeline.cache.format import (
    CALIBRATION,
    TAIL,
    Index,
    array_path,
    read_index,
    read_manifest,
)
from pipeline.cache.writer import pending_shards
from pipeline.outputs import read_tensors
from singer.tail import TeacherTail

Encoded = dict[int, dict[str, Tensor]]


class Cache:
    """A complete cache, opened for reading. Safe to share between threads.

    Raises ValueError if there is none at `path`, or if shards are still missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.id = self.manifest.id()
        missing = pending_shards(path, self.manifest)
        if missing:
            raise ValueError(
                f"{path} is incomplete: {len(missing)} of {self.manifest.shards} shards are missing; "
                "repeat its cache-teacher command with --resume"
            )
        self._codec = CODECS[self.manifest.codec]
        self._parts = list(self._codec.parts(self.manifest.tokens, self.manifest.teacher.width))
        self._calibration: dict[torch.device, dict[int, Calibration]] = {}

    def __len__(self) -> int:
        return self.manifest.records

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.manifest.blocks

    @cached_property
    def index(self) -> Index:
        index = read_index(self.path)
        if len(index) != len(self) or index.images.content_hash() != self.manifest.data.hash:
            raise ValueError(f"the index of {self.path} does not belong to its manifest")
        return index

    @cached_property
    def _arrays(self) -> dict[tuple[int, str], Any]:
        # Opened on first use: tensorstore's threads do not survive a fork.
        return {(b, p): _open(self.path / array_path(b, p)) for b in self.blocks for p in self._parts}

    def read(self, records: Sequence[int] | np.ndarray) -> Encoded:
        """The stored form of some records, {block: {part: (n, ...)}}, on the CPU, in the order asked for."""
        chosen = np.asarray(records, dtype=np.int64)
        futures = {key: array[chosen].read() for key, array in self._arrays.items()}
        encoded: Encoded = {block: {} for block in self.blocks}
        for (block, part), future in futures.items():
            encoded[block][part] = torch.from_numpy(future.result())
        return encoded

    def decode(self, encoded: Mapping[int, Mapping[str, Tensor]], device: torch.device) -> dict[int, Tensor]:
        """{block: features (n, N, d) float32} on the device, moved there in their stored form."""
        calibration = self._calibration_on(device)
        features = {}
        for block, parts in encoded.items():
            moved = {name: part.to(device, non_blocking=True) for name, part in parts.items()}
            features[block] = self._codec.decode(moved, calibration[block])
        return features

    def features(self, records: Sequence[int] | np.ndarray, device: torch.device) -> dict[int, Tensor]:
        """{block: features (n, N, d) float32} of some records."""
        return self.decode(self.read(records), device)

    def tail(self) -> TeacherTail:
        """The frozen end of the teacher, on the CPU."""
        teacher = self.manifest.teacher
        state = read_tensors(self.path / TAIL)
        try:
            return TeacherTail(teacher.architecture, teacher.model_args, self.manifest.tail_first_block, state)
        except RuntimeError as error:
            raise ValueError(f"{self.path / TAIL} is damaged: {str(error).splitlines()[0]}") from None

    def _calibration_on(self, device: torch.device) -> dict[int, Calibration]:
        if device not in self._calibration:
            self._calibration[device] = read_calibration(self.path, self.blocks, device)
        return self._calibration[device]


def read_calibration(path: Path, blocks: Sequence[int], device: torch.device) -> dict[int, Calibration]:
    tensors = read_tensors(path / CALIBRATION, str(device))
    try:
        return {b: Calibration(tensors[f"{b}.mean"], tensors[f"{b}.std"]) for b in blocks}
    except KeyError as error:
        raise ValueError(f"{path / CALIBRATION} is damaged: it has no {error}") from None


def _open(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return ts.open(spec, read=True).result()
