"""The time that caching adds to the teacher's forward pass, and the speed of caching features from memory.

    python benchmarks/write_speed.py [--teacher FILE --shards 'train-*.tar'] [--codecs float16 int8 int4]
        [--model vit_tiny_patch16_224] [--images 512] [--rounds 12] [--width 384] [--gigabytes 1] [--folder FOLDER]

It prints two Markdown tables. The first needs a teacher: it compares `fill`, the loop of cache-teacher, with the bare
forward pass of the same decoded batches, in turns of --images images; the ratio is the median over neighbouring turns.
The processor time of all threads depends less on other work of the machine. The validation of images and the
calibration, which come before, are left out. The second table has the GB/s of features, counted as float16, that the
same loop encodes and writes durably, and the ratio to writing and syncing as many float16 bytes to plain files.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from read_speed import BATCH, BLOCK, TOKENS, create_synthetic, synthetic_features, synthetic_manifest, synthetic_views
from torch import Tensor

from pipeline.cache import create
from pipeline.cache.background_writer import writing
from pipeline.cache.codecs import CODECS
from pipeline.cache.extract import Extractor
from pipeline.cache.fill import fill as fill_segment
from pipeline.cache.format import VIEWS
from pipeline.cache.index import read_images
from pipeline.cache.segment_reader import read_calibration
from pipeline.cache.segments import read_segments
from pipeline.cache.view_reader import ViewBatch, ViewReader
from pipeline.config import load_config
from pipeline.data import ImageFile, index_images
from pipeline.runtime.devices import this_process
from pipeline.runtime.prefetch import prefetch
from pipeline.storage import LocalStore
from pipeline.teachers.teacher import load_teacher

# Shards are small, so that every turn also writes; larger shards are synced less often.
SHARD_RECORDS = 128


class Turn(NamedTuple):
    """The seconds for one image in a turn."""

    wall: float
    processor: float


def seconds(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def against_teacher(options: argparse.Namespace, codec: str, scratch: Path) -> list[tuple[Turn, Turn]]:
    """Return (the teacher alone, fill) of every turn."""
    sets = [f"teacher.weights={options.teacher}", f"teacher.name={options.model}", f"cache.codec={codec}"]
    config = load_config(sets=[*sets, "views.pixels=none"])  # both sides decode, and only features are compared
    backbone = load_teacher(config.teacher)
    extract = Extractor(config, backbone, this_process().device)
    create.create_segments(config, index_images(options.shards), scratch, "new", extract)
    (part,) = read_segments(LocalStore(scratch))
    manifest, images = part.manifest, read_images(part.store)
    turn = max(1, options.images // manifest.shard_records)
    groups = [range(n, n + turn) for n in range(0, manifest.zarr_shards - turn + 1, turn)]

    def bare(group: Sequence[int]) -> None:
        with ImageFile(images) as files:
            read = ViewReader(files, manifest, "fail")
            size = config.cache.views_at_once
            ranges = [manifest.zarr_shard_range(shard) for shard in group]
            batches = [np.arange(a, min(a + size, stop)) for start, stop in ranges for a in range(start, stop, size)]
            for batch in prefetch(read, batches, config.cache.workers):
                extract.features(batch.pixels, manifest.blocks, batch.copies)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def fill(group: Sequence[int]) -> None:
        fill_segment(part, group, extract, [part])

    turns, order = [], [bare, fill]
    for number in range(options.rounds + 1):
        group = groups[number % len(groups)]
        count = sum(stop - start for start, stop in map(manifest.zarr_shard_range, group))
        took = {}
        for run in order:
            busy = time.process_time()
            wall = seconds(partial(run, group))
            took[run] = Turn(wall / count, (time.process_time() - busy) / count)
        order.reverse()
        if number:  # the first turn warms up
            turns.append((took[bare], took[fill]))
    return turns


def from_memory(codec: str, width: int, features: Sequence[Tensor], folder: Path, shards: int) -> float:
    """Return the seconds for storing the batches in each of the shards, as fill stores the teacher's features."""
    records = sum(map(len, features))
    manifest = synthetic_manifest(codec, TOKENS, width, shards * records)
    manifest = manifest.model_copy(update={"shard_records": records})
    store = LocalStore(folder)
    create_synthetic(store, manifest)
    (part,) = read_segments(store)
    calibration = read_calibration(part)

    def store_all() -> None:
        with writing(part, calibration, str) as write:
            for batch in range(shards * len(features)):
                rows = np.arange(batch * BATCH, (batch + 1) * BATCH)
                views = synthetic_views(manifest, int(rows[0]), int(rows[-1]) + 1)
                read = ViewBatch(rows, torch.empty(0), views.numpy(), {}, None, {VIEWS: views})
                write({BLOCK: features[batch % len(features)]}, read)

    return seconds(store_all)


def plainly(values: np.ndarray, folder: Path, shards: int) -> float:
    """Return the seconds for writing and syncing float16 features from memory, with one file for each shard."""

    def write_all() -> None:
        for shard in range(shards):
            with (folder / str(shard)).open("wb") as file:
                file.write(values.data)
                file.flush()
                os.fsync(file.fileno())

    return seconds(write_all)


def print_teacher(options: argparse.Namespace) -> None:
    """Measure and print the first table."""
    print(f"{options.model}, turns of {options.images} images, medians of {options.rounds} turns each\n")
    print("| codec | teacher alone, images/s | cache-teacher | ratio | processor, ms an image | of the teacher's |")
    print("|---|---|---|---|---|---|")
    for codec in options.codecs:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            turns = against_teacher(options, codec, Path(scratch) / "cache")
        alone, caching = (1 / statistics.median(t.wall for t in kind) for kind in zip(*turns, strict=True))
        ratio = statistics.median(a.wall / b.wall for a, b in turns)
        busy = statistics.median(b.processor for _, b in turns)
        more = statistics.median(b.processor / a.processor for a, b in turns)
        print(f"| {codec} | {alone:.1f} | {caching:.1f} | {ratio:.3f} | {1e3 * busy:.1f} | {more:.3f} |", flush=True)


def print_memory(options: argparse.Namespace) -> None:
    """Measure and print the second table, with all codecs in every round."""
    fitting = (128 << 20) // (2 * TOKENS * options.width) // BATCH
    features = [synthetic_features(BATCH, TOKENS, options.width, seed) for seed in range(fitting)]
    values = torch.cat(features).half().numpy()
    shards = max(1, round(options.gigabytes * 1e9 / values.nbytes))
    times: dict[str, list[float]] = {name: [] for name in ("plain file", *options.codecs)}
    for round_ in range(options.memory_rounds + 1):
        for name, measured in times.items():
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                folder = Path(scratch)
                taken = (
                    plainly(values, folder, shards)
                    if name == "plain file"
                    else from_memory(name, options.width, features, folder, shards)
                )
            if round_:
                measured.append(taken)
    print(
        f"\n{shards} shards of {len(values)} x {TOKENS} x {options.width}, medians of {options.memory_rounds} rounds\n"
    )
    print("| stored as | GB/s of features in float16 | of the plain file |\n|---|---|---|")
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["plain file"], measured, strict=True))
        print(f"| {name} | {shards * values.nbytes / statistics.median(measured) / 1e9:.2f} | {ratio:.2f} |")


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--shards")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["float16", "int8", "int4"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the float16 features from memory")
    parser.add_argument("--memory-rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder for temporary caches; default: the system's")
    options = parser.parse_args()
    if options.teacher is not None:
        create.MAX_SHARD_RECORDS = SHARD_RECORDS
        print_teacher(options)
    print_memory(options)


if __name__ == "__main__":
    main()
