"""The batch size of a teacher: as a cache was begun with it, or found on a GPU (cache.batch_size auto)."""

import time
from collections.abc import Callable

import torch
import yaml

from pipeline.config import Config, ViewsConfig, left_open, read_dumped
from pipeline.outputs.resuming import CONFIG
from pipeline.runtime.progress import say
from pipeline.storage import Store

LEAST, MOST = 8, 1024
# A batch that is twice as large has to be faster by this share; after so many that are not, the search ends.
_GAIN, _IN_VAIN = 0.03, 2
# The share of the memory beside the weights that a forward pass may take. The rest is for encoding.
_MEMORY = 0.5
_SECONDS, _RUNS = 0.3, 2


def as_begun(config: Config, store: Store) -> Config:
    """Return the configuration with what a cache was begun with: its batch size, and whether it was compiled.

    Otherwise the last bits of the features would change. Views are stored as before, too, if that is left open.
    """
    try:
        told = read_dumped(store.read(CONFIG))
        begun = {
            "cache": {name: told["cache"][name] for name in ("batch_size", "compile")},
            "views": {name: told["views"][name] for name in ViewsConfig.model_fields if left_open(config.views, name)},
        }
        known = Config.model_validate({n: {**getattr(config, n).model_dump(), **own} for n, own in begun.items()})
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return config
    return config.model_copy(update={"cache": known.cache, "views": known.views})


def with_batch_size(config: Config, run: Callable[[int], object], device: torch.device) -> Config:
    """Return the configuration with a batch size in the place of auto: found on a GPU, the default's on a CPU.

    run: computes the features of so many views on the device.
    """
    if config.cache.batch_size != "auto":
        return config
    size = config.cache.views_at_once
    if device.type == "cuda":
        rates = measure(lambda views: rate_on_gpu(run, views, device))
        size = useful_size(rates)
        say(f"cache.batch_size auto: {size} views, {rates.get(size, 0.0):.4g} a second on {device}")
    return config.changed(cache={"batch_size": size})


def measure(rate: Callable[[int], float | None]) -> dict[int, float]:
    """Return {batch size: its rate}, from LEAST on and doubled until memory or the gain ends.

    rate: returns views a second, or None if the batch takes too much memory.
    """
    rates: dict[int, float] = {}
    size, best, in_vain = LEAST, 0.0, 0
    while size <= MOST and in_vain < _IN_VAIN and (found := rate(size)) is not None:
        in_vain = 0 if found >= (1 + _GAIN) * best else in_vain + 1
        rates[size], best, size = found, max(best, found), 2 * size
    return rates


def useful_size(rates: dict[int, float]) -> int:
    """Return the smallest size that is nearly as fast as the fastest; LEAST if even that took too much memory."""
    return min((size for size, rate in rates.items() if (1 + _GAIN) * rate >= max(rates.values())), default=LEAST)


def rate_on_gpu(run: Callable[[int], object], size: int, device: torch.device) -> float | None:
    """Return views a second of a batch size, or None if it takes more than its share of a GPU's memory.

    All GPUs of the process count, because a teacher may be spread over them (teacher.offload).
    """
    gpus = range(torch.cuda.device_count())
    before = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    seconds = None
    try:
        run(size)  # kernels are chosen and memory is taken
        torch.cuda.synchronize(device)
        start, runs = time.perf_counter(), 0
        while runs < _RUNS or time.perf_counter() - start < _SECONDS:
            run(size)
            torch.cuda.synchronize(device)
            runs += 1
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        pass
    if seconds is None:
        # Only now has the error let go of what the pass had computed.
        torch.cuda.empty_cache()
        return None
    for gpu, held in zip(gpus, before, strict=True):
        free = torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - held
        if torch.cuda.max_memory_allocated(gpu) - held > _MEMORY * free:
            return None
    return runs * size / max(seconds, 1e-9)
