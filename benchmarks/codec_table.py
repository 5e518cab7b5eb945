"""The size, errors and speed of each codec, on the features of a float16 cache.

    python benchmarks/codec_table.py --cache CACHE [--records 512]

It calibrates on one random set of records, measures on another and prints a Markdown table. Clean and artifact tokens
are patch tokens below and above the calibration's threshold; an error is the norm of the difference over the norm, for
all these tokens together; a cosine is a mean over tokens; encode and decode are medians for a batch of 64 records, in
memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CODECS, Cache
from pipeline.cache.calibration import calibrate
from pipeline.cache.stored import Ragged, Stored
from singer.artifacts import clean_mask, patch_norms

CALIBRATION_RECORDS = 256
BATCH = 64
HEADER = (
    "block", "codec", "bytes a record", "ratio", "outliers, % of bytes", "clean error, %", "clean cosine",
    "artifact error, %", "artifact cosine", "prefix error, %", "encode, ms", "decode, ms",
)  # fmt: skip


def size(stored: Stored) -> tuple[int, int]:
    """Return the bytes in all parts and in ragged parts, without the lengths."""
    ragged = sum(p.data.nbytes for p in stored.values() if isinstance(p, Ragged))
    return ragged + sum(p.nbytes for p in stored.values() if isinstance(p, Tensor)), ragged


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 30) -> float:
    """Return the median time of a call in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def error_and_cosine(decoded: Tensor, x: Tensor) -> tuple[float, float]:
    """Return the relative error (%) and the mean cosine of tokens (k, d), which are NaN if there are none."""
    return 100 * float((decoded - x).norm() / x.norm()), float(torch.cosine_similarity(decoded, x, dim=-1).mean())


def main() -> None:
    """Parse the options and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    device: torch.device = options.device

    cache = Cache(options.cache)
    prefix = cache.manifest.teacher.prefix_tokens
    order = np.random.default_rng(0).permutation(len(cache))
    sample, records = np.split(order[: CALIBRATION_RECORDS + options.records], [CALIBRATION_RECORDS])
    if not len(records):
        raise SystemExit(f"{options.cache} holds {len(cache)} records; more than {CALIBRATION_RECORDS} are needed")
    calibrations = {b: calibrate(x, prefix) for b, x in cache.features(sample, device).items()}
    features = cache.features(records, device)

    print(f"{len(records)} records of {options.cache.name}, {device}, {torch.get_num_threads()} threads\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for block, x in features.items():
        calibration = calibrations[block]
        clean = clean_mask(patch_norms(x, prefix), calibration.threshold)
        for name, codec in CODECS.items():
            stored = codec.encode(x, calibration)
            decoded = codec.decode(stored, calibration)
            total, ragged = size(stored)
            patches, truth = decoded[:, prefix:], x[:, prefix:]
            error, cosine = error_and_cosine(patches[clean], truth[clean])
            artifact_error, artifact_cosine = error_and_cosine(patches[~clean], truth[~clean])
            prefix_error, _ = error_and_cosine(decoded[:, :prefix].flatten(0, 1), x[:, :prefix].flatten(0, 1))
            batch = codec.encode(x[:BATCH], calibration)
            encode = milliseconds(partial(codec.encode, x[:BATCH], calibration), device, 5)
            decode = milliseconds(partial(codec.decode, batch, calibration), device)
            print(
                f"| {block} | {name} | {total / len(x):.0f} | {2 * x.numel() / total:.2f} | {100 * ragged / total:.1f} "
                f"| {error:.2f} | {cosine:.5f} | {artifact_error:.2f} | {artifact_cosine:.5f} | {prefix_error:.2f} "
                f"| {encode:.1f} | {decode:.2f} |"
            )


if __name__ == "__main__":
    main()
