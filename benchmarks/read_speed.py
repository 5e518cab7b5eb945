"""Reading a cache in shuffled batches, compared with copying a memory map of as many bytes in order.

    python benchmarks/read_speed.py [--folder FOLDER] [--gigabytes 3] [--rounds 9] [--widths 192 384 1024]
        [--codecs float16 int4] [--batch 256] [--cold]

It writes caches of random features of 197 tokens with singer's own writer, reads them with warm pages (--cold: from the
disk), and deletes them. An epoch must be much longer than what is prefetched: a window has up to 256 MB. It prints a
Markdown table: GB/s of stored bytes, and the ratio to the memory map, as medians over interleaved rounds. Shards in
float16 are plain Zarr, so other engines read a part of the epoch, too; zarrs runs in its own process.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from math import isqrt
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from pipeline.cache.calibration import calibrate
from pipeline.cache.codecs import CODECS
from pipeline.cache.completion import complete_segment
from pipeline.cache.format import FEATURES, PIXELS, VIEWS, zarr_shard_file
from pipeline.cache.manifest import DataManifest, Manifest, PixelsManifest, TeacherManifest
from pipeline.cache.reader import Cache
from pipeline.cache.segments import read_segments
from pipeline.cache.stored import Ragged, Stored
from pipeline.cache.writer import create_segment, small_files, write_zarr_shard
from pipeline.config import DistillConfig
from pipeline.data import Images, Keys, listing_hash
from pipeline.data.sampler import batch_index_lists, prefetch_depth
from pipeline.runtime.prefetch import prefetch
from pipeline.storage import LocalStore
from pipeline.training.batch import BatchLoader
from singer.sizes import Size

BLOCK, TOKENS = 0, 197
# The records in a batch that is written, or that other engines read.
BATCH = 64
ARRAY = f"{FEATURES}/{BLOCK}/values"
ARTIFACTS = 0.01
# The number of batches for engines that take seconds for one.
SLOW_BATCHES = 4
MEMORY_MAP = "memory map, copied in order"
Engine = Callable[[], int]
"""A function that reads some batches and returns the number of their bytes."""


def synthetic_manifest(
    codec: str, tokens: int, width: int, records: int, pixel_size: int = 0, shard_bytes: int = 128 << 20
) -> Manifest:
    """Return the manifest of a cache with one block, which no real teacher made.

    It has a class token, and stores views if pixel_size is not 0.
    """
    side = isqrt(tokens - 1)
    teacher = TeacherManifest(
        name="synthetic", architecture="none", model_args={}, weights="0" * 64, depth=1, width=width, prefix_tokens=1,
        class_token=True, grid=(side, side), image_size=pixel_size or 16 * side, mean=(0.5,) * 3, std=(0.5,) * 3,
        precision="no", dtype="float32", shapes=None, copies=1,
    )  # fmt: skip
    forms = [form for form in CODECS[codec].parts(tokens, width).values() if form is not None]
    fitting = shard_bytes // max(int(np.prod(f.shape)) * np.dtype(f.dtype).itemsize for f in forms)
    return Manifest(
        teacher=teacher,
        data=DataManifest(shards=(), images=records, labelled=0, hash=listing_hash(synthetic_images(records))),
        views={"first": 0, "count": 1, "color": [0, 0, 0, 0], "shape": [1, 1]},
        blocks=(BLOCK,),
        codec=codec,
        stored_patches=side * side,
        pixels=PixelsManifest(kind="uint8", size=pixel_size, quality=None) if pixel_size else None,
        records=records,
        shard_records=min(records, fitting, 4096),
        tail_first_block=BLOCK,
    )


def synthetic_images(count: int) -> Images:
    """Return the index of images that do not exist."""
    zeros = np.zeros(count, np.int64)
    keys = Keys.of(f"{n:07d}" for n in range(count))
    return Images((), (), keys, zeros.astype(np.int32) - 1, zeros.astype(np.int32), zeros, zeros)


def synthetic_features(records: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """Return features (n, N, d) float32 from a standard normal, with artifact tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(records, tokens, width, generator=generator)
    x[torch.rand(records, tokens, generator=generator) < ARTIFACTS] *= 10
    return x


def create_synthetic(store: LocalStore, manifest: Manifest) -> None:
    """Write everything of a cache but the shards."""
    images = synthetic_images(manifest.records)
    calibration = calibrate(synthetic_features(BATCH, manifest.tokens_of(BLOCK), manifest.teacher.width), 1)
    create_segment(store, manifest, small_files(manifest, images, {}, {BLOCK: calibration}, {}))


def write_synthetic(folder: Path, manifest: Manifest) -> None:
    """Write a whole cache.

    All its shards hold the same features, because the values have no influence on the speed.
    """
    store = LocalStore(folder)
    create_synthetic(store, manifest)
    shape = manifest.tokens_of(BLOCK), manifest.teacher.width
    calibration = calibrate(synthetic_features(BATCH, *shape), 1)
    stored: list[Stored] = []
    for first in range(0, manifest.shard_records, BATCH):
        x = synthetic_features(min(BATCH, manifest.shard_records - first), *shape, seed=first)
        stored.append(CODECS[manifest.codec].encode(x, calibration))
    for shard in range(manifest.zarr_shards):
        start, stop = manifest.zarr_shard_range(shard)
        values: Stored = {
            f"{FEATURES}/{BLOCK}/{name}": first_rows([s[name] for s in stored], stop - start) for name in stored[0]
        }
        if manifest.pixels is not None:
            form = stop - start, *Size.of(manifest.pixels.size), 3
            values[PIXELS] = torch.full(form, shard % 256, dtype=torch.uint8)
        values[VIEWS] = synthetic_views(manifest, start, stop)
        write_zarr_shard(store, manifest, shard, values, {})
    (part,) = read_segments(store)
    complete_segment(part)


def synthetic_views(manifest: Manifest, start: int, stop: int) -> Tensor:
    """Return the stored views of some records: each is a whole image of 16 x 16 pixels."""
    found = np.zeros(stop - start, manifest.view_form)
    found["digest"], found["width"], found["height"] = np.arange(start, stop), 16, 16
    found["box"] = 0, 0, 1, 1
    return torch.from_numpy(found.view(np.uint8).reshape(len(found), -1))


def first_rows(parts: Sequence[Tensor | Ragged], count: int) -> Tensor | Ragged:
    """Return the first rows of parts that are joined."""
    ragged = [p for p in parts if isinstance(p, Ragged)]
    if not ragged:
        return torch.cat([p for p in parts if isinstance(p, Tensor)])[:count]
    whole = Ragged.cat(ragged)
    lengths = whole.lengths[:count]
    return Ragged(whole.data[: int(lengths.sum())], lengths)


def payload_bytes(cache: Cache) -> int:
    """Return the bytes of all shards, without their indices."""
    manifest = cache.manifest
    root = Path(str(cache.place))
    files = [root / zarr_shard_file(n, f, s) for n, f in manifest.arrays().items() for s in range(manifest.zarr_shards)]
    return sum(f.stat().st_size - 16 * manifest.shard_records - 4 for f in files)


def engines(folder: Path, slow_batches: int, batch: int) -> Iterator[tuple[str, Engine]]:
    """Yield (name, engine) of singer and, for float16, of all others that are installed."""
    cache = Cache(folder)
    count, total = len(cache) // batch, payload_bytes(cache)

    loader = BatchLoader([cache], None, [])

    def singer(workers: int, block: int | None = None) -> int:
        settings = DistillConfig(batch_size=batch, read_block=block, workers=workers)
        ahead = prefetch_depth(settings, len(cache), loader.record_bytes, 1)
        lists = batch_index_lists(len(cache), loader.record_bytes, settings, 0, 1, 0, count)
        for _ in prefetch(loader.features, lists, workers, most=ahead):
            pass
        return total * count * batch // len(cache)

    yield MEMORY_MAP, memory_map(folder, batch)
    yield "singer, 1 worker", partial(singer, 1)
    yield "singer, 2 workers", partial(singer, 2)
    for block in (1, 64):
        yield f"singer, 2 workers, read_block {block}", partial(singer, 2, block)
    if cache.manifest.codec != "float16":
        return
    yield from zarr_engines(folder, slow_batches, "zarr-python")
    if find_spec("tensorstore") is None:
        print("tensorstore is not installed")
        return
    import tensorstore

    place = {"driver": "file", "path": str(folder / ARRAY)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place}).result()
    plan = some_batches(len(cache), slow_batches)
    yield "tensorstore, scattered", lambda: sum(array[records].read().result().nbytes for records in plan)


def zarr_engines(folder: Path, batches: int, name: str) -> Iterator[tuple[str, Engine]]:
    """Yield (name, engine) of Zarr with its current codec pipeline."""
    array = zarr.open_array(folder / ARRAY, mode="r")
    plan = some_batches(array.shape[0], batches)
    yield f"{name}, scattered", lambda: sum(np.asarray(array.oindex[records]).nbytes for records in plan)
    starts = range(0, batches * BATCH, BATCH)
    yield f"{name}, in order", lambda: sum(np.asarray(array[n : n + BATCH]).nbytes for n in starts)


def zarrs_engines(folder: Path, batches: int, batch: int) -> Iterator[tuple[str, Engine]]:
    """Yield (name, engine) of the memory map and of zarrs, which replaces Zarr's codec pipeline in this process."""
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    yield MEMORY_MAP, memory_map(folder, batch)
    yield from zarr_engines(folder, batches, "zarrs")


def some_batches(records: int, batches: int) -> list[np.ndarray]:
    """Return the records of some shuffled batches."""
    return np.split(np.random.default_rng(0).permutation(records)[: batches * BATCH], batches)


def memory_map(folder: Path, batch: int) -> Engine:
    """Return an engine that copies as many bytes as the cache holds, in as many pieces, from a memory map."""
    cache = Cache(folder)
    count = len(cache) // batch
    size = payload_bytes(cache) // count
    flat = folder.with_suffix(".bin")
    if not flat.exists():
        np.ones(count * size, np.uint8).tofile(flat)

    def copy() -> int:
        for row in np.memmap(flat, mode="r", dtype=np.uint8, shape=(count, size)):
            copied = np.array(row)  # held while the next one is read, as a training loop does
        return count * copied.nbytes

    return copy


def rates(
    folder: Path, kinds: Callable[[Path, int, int], Iterator[tuple[str, Engine]]], rounds: int, batch: int, cold: bool
) -> dict[str, tuple[float, float]]:
    """Return {engine: (GB/s, ratio to the memory map in the same round)}, as medians over interleaved rounds."""
    found = dict(kinds(folder, SLOW_BATCHES, batch))
    measured: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, engine in found.items():
            if cold:
                forget(folder.parent)
            else:
                engine()  # so that its memory is allocated, as it is early in an epoch
            start = time.perf_counter()
            size = engine()
            measured[name].append(size / (time.perf_counter() - start) / 1e9)
    truth = measured[MEMORY_MAP]
    ratios = {name: [a / b for a, b in zip(values, truth, strict=True)] for name, values in measured.items()}
    return {name: (statistics.median(measured[name]), statistics.median(ratios[name])) for name in found}


def forget(folder: Path) -> None:
    """Let the system drop the files' content from memory."""
    os.sync()  # pages that are not on the disk yet would stay
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_rows(payload: str, measured: dict[str, tuple[float, float]]) -> None:
    """Print one row for each engine."""
    for name, (rate, ratio) in measured.items():
        print(f"| {payload} | {name} | {rate:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for temporary caches; default: the system's")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of each cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 384, 1024])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["float16", "int4"])
    parser.add_argument("--batch", type=int, default=256, help="records a batch, by default as in distill")
    parser.add_argument("--cold", action="store_true", help="drop the files from memory before each pass")
    options = parser.parse_args()

    print(f"batches of {options.batch}, medians of {options.rounds} rounds{', from the disk' * options.cold}\n")
    print("| stored | engine | GB/s | of the memory map |\n|---|---|---|---|")
    for codec in options.codecs:
        for width in options.widths:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                folder = Path(scratch) / "cache"
                record = record_bytes(codec, width)
                write_synthetic(folder, synthetic_manifest(codec, TOKENS, width, int(options.gigabytes * 1e9 / record)))
                payload = f"{TOKENS} x {width} {codec}, {record / 1e3:.0f} kB a record"
                print_rows(payload, rates(folder, engines, options.rounds, options.batch, options.cold))
                if codec == "float16":
                    measure_zarrs(payload, folder, options)


def record_bytes(codec: str, width: int) -> int:
    """Return the stored bytes of a record."""
    stored = CODECS[codec].encode(x := synthetic_features(BATCH, TOKENS, width), calibrate(x, 1))
    return sum(p.data.nbytes if isinstance(p, Ragged) else p.nbytes for p in stored.values()) // BATCH


def measure_zarrs(payload: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure zarrs in its own process and print its rows, or why they are missing."""
    if find_spec("zarrs") is None:
        print("zarrs is not installed")
        return
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            arguments = folder, zarrs_engines, options.rounds, options.batch, options.cold
            print_rows(f"{payload}; own process", pool.submit(rates, *arguments).result())
    except (BrokenProcessPool, RuntimeError, ValueError) as error:
        print(f"zarrs fails: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
