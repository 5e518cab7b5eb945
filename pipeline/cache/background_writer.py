"""Encode the teacher's features and write whole Zarr shards, while the teacher computes the next features."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from pipeline.cache.calibration import Calibration, few_records
from pipeline.cache.codecs import CODECS, naming_block
from pipeline.cache.extract import check_finite
from pipeline.cache.format import FEATURES, POSITIONS
from pipeline.cache.segments import Segment
from pipeline.cache.stored import Fixed, Ragged, Stored
from pipeline.cache.view_reader import ViewBatch
from pipeline.cache.writer import write_zarr_shard
from pipeline.runtime.background import BackgroundWorker
from pipeline.runtime.buffers import empty
from singer.tokens import take_patches


class Gathered:
    """The values of the arrays of one Zarr shard, collected on the CPU a few records at a time.

    arrays: {name: form}; records: how many records it has.
    """

    def __init__(self, arrays: Mapping[str, Fixed | None], records: int) -> None:
        self._records = records
        self._fixed = {n: empty((records, *form.shape), form.dtype) for n, form in arrays.items() if form is not None}
        self._filled = dict.fromkeys(self._fixed, 0)
        self._ragged: dict[str, list[Ragged]] = {n: [] for n, form in arrays.items() if form is None}
        self.unreadable: dict[int, str] = {}

    def add(self, name: str, values: Tensor | Ragged) -> None:
        """Append the next records of an array; their values may be on any device."""
        if isinstance(values, Ragged):
            self._ragged[name].append(values.to("cpu"))
            return
        start = self._filled[name]
        self._filled[name] = start + len(values)
        # To pinned memory, a copy is only started; see SideStream.
        self._fixed[name][start : self._filled[name]].copy_(values, non_blocking=True)

    def whole(self) -> Stored:
        """Return {array: its values}, once all records have been added."""
        ragged = {name: Ragged.cat(strings) for name, strings in self._ragged.items()}
        assert {*self._filled.values(), *(len(r.lengths) for r in ragged.values())} == {self._records}
        return {**self._fixed, **ragged}


class SideStream:
    """A stream on which a GPU encodes features and copies them to the CPU, beside the teacher's next forward pass.

    On one stream with the teacher, every value that encoding reads back would wait for that pass to end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def computed(self) -> torch.cuda.Event:
        """Return the event after which features are there; to be called in the thread that computes them."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextmanager
    def after(self, computed: torch.cuda.Event) -> Iterator[None]:
        """Run a block on the stream once features are computed, and wait for its end, as copies need."""
        self._stream.wait_event(computed)
        with torch.cuda.stream(self._stream):
            yield
        # The caller holds the features until here, so their memory cannot have been given to the next pass.
        self._stream.synchronize()


@contextmanager
def writing(
    segment: Segment, calibration: Mapping[int, Calibration], key: Callable[[int], str]
) -> Iterator[Callable[[dict[int, Tensor], ViewBatch], None]]:
    """Give a function to call with the features of every batch, in order.

    calibration: {block: its calibration}, on the device of the features; key: record -> the key of its image.
    All records of a batch are in one Zarr shard. Background workers encode a batch and write a Zarr shard while the
    teacher computes the next batch. At the end of the `with` block, all Zarr shards that got their last record have
    been written. An error in encoding or writing is raised by one of the next calls, or at the end of the block, such
    as UserError naming the image's key for a NaN or Inf.
    """
    manifest = segment.manifest
    codec, prefix = CODECS[manifest.codec], manifest.teacher.prefix_tokens
    gathered: Gathered | None = None
    device = next(iter(calibration.values())).mean.device
    side = SideStream(device) if device.type == "cuda" else None

    def add(features: dict[int, Tensor], batch: ViewBatch, computed: "torch.cuda.Event | None" = None) -> None:
        nonlocal gathered
        shard = int(batch.records[0]) // manifest.shard_records
        start, stop = manifest.zarr_shard_range(shard)
        if gathered is None:
            gathered = Gathered(manifest.arrays(), stop - start)
        gathered.unreadable |= batch.unreadable
        with nullcontext() if side is None or computed is None else side.after(computed):
            for name, values in batch.beside.items():
                gathered.add(name, values)
            positions = batch.beside.get(POSITIONS)
            for block, x in features.items():
                done = 0
                for few in few_records(x):
                    own = slice(done, done := done + len(few))
                    check_finite({block: few}, batch.records[own], key)
                    if isinstance(positions, Tensor):
                        few = take_patches(few, prefix, positions[own])
                    with naming_block(block):
                        stored = codec.encode(few, calibration[block])
                    for part, values in stored.items():
                        gathered.add(f"{FEATURES}/{block}/{part}", values)
        if batch.records[-1] == stop - 1:
            write(segment.store, manifest, shard, gathered.whole(), gathered.unreadable)
            gathered = None

    with BackgroundWorker(write_zarr_shard, "write") as write, BackgroundWorker(add, "encode") as encode:
        yield encode if side is None else lambda features, batch: encode(features, batch, side.computed())
