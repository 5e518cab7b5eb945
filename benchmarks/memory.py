"""Memory against the size of the cache: peak RSS with some records, and with ten times as many.

    python benchmarks/memory.py [--records 2000] [--codecs int4 float16] [--batch 64] [--folder FOLDER]

It writes caches of random features (65 tokens of width 192, views of 32 x 32 pixels). Then it reads and decodes a
shuffled epoch, and distils a tiny student for an epoch, each in a new process. It prints a Markdown table: MB before
the cache is opened, MB at the peak, and the ratio of the peaks.
"""

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from read_speed import synthetic_manifest, write_synthetic

from pipeline.cache.codecs import CODECS
from pipeline.cache.reader import Cache
from pipeline.config import load_config
from pipeline.data.sampler import EpochOrder
from pipeline.runtime.prefetch import prefetch
from pipeline.stages.distill import distill

TOKENS, WIDTH, PIXELS = 65, 192, 32
TIMES = 10
STUDENT = ("student.dim=32", "student.depth=2", "student.heads=2", f"student.patch_size={PIXELS // 8}")


def read_epoch(cache: Path, batch: int) -> None:
    """Read and decode a shuffled epoch."""
    opened = Cache(cache)
    order = EpochOrder(len(opened), 0, 0)
    plan = (order.stretch(start, start + batch) for start in range(0, len(opened), batch))
    for encoded in prefetch(opened.read, plan, 2):
        opened.decode(encoded, torch.device("cpu"))


def distill_epoch(cache: Path, batch: int) -> None:
    """Distil a tiny student for an epoch."""
    config = load_config(sets=[*STUDENT, "distill.epochs=1", f"distill.batch_size={batch}"])
    distill(config, cache, cache.with_name("run"), mode="overwrite")


def peak(run: Callable[[Path, int], None], cache: Path, batch: int) -> tuple[float, float]:
    """Return the memory (MB) of this process before `run` and at the peak; it must do nothing else."""
    before = resident("VmRSS")
    run(cache, batch)
    return before, resident("VmHWM")


def resident(field: str) -> float:
    """Return a field of /proc/self/status in MB, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=["int4", "float16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="folder for temporary caches; default: the system's")
    options = parser.parse_args()
    counts = [options.records, TIMES * options.records]
    columns = [f"{n} records: {when}, MB" for n in counts for when in ("before", "peak")]
    print(f"| codec | epoch | {' | '.join(columns)} | ratio of peaks |\n|{'---|' * 7}")
    for codec in options.codecs:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            caches = [Path(scratch) / str(n) / "cache" for n in counts]
            for count, cache in zip(counts, caches, strict=True):
                write_synthetic(cache, synthetic_manifest(codec, TOKENS, WIDTH, count, PIXELS))
            for run in (read_epoch, distill_epoch):
                found = []
                for cache in caches:
                    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                        found.append(pool.submit(peak, run, cache, options.batch).result())
                ratio = found[1][1] / found[0][1]
                figures = " | ".join(f"{mb:.0f}" for mb in np.ravel(found))
                print(f"| {codec} | {run.__name__.replace('_', ' ')} | {figures} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
