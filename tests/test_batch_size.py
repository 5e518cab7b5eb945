"""cache.batch_size auto: found on a GPU, fixed on a CPU, and never changed in a cache that is continued."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import world_config

import pipeline.stages.cache_teacher as stage
from pipeline.cache import batch_size
from pipeline.cache.batch_size import LEAST, MOST, measure, rate_on_gpu, useful_size
from pipeline.cache.format import JOURNAL
from pipeline.config import Config, load_config
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.storage import open_store
from singer.errors import UserError

GB = 2**30


@pytest.mark.parametrize(
    ("rate", "size", "tried"),
    [
        (lambda n: 1000 * n / (n + 20), 512, MOST),  # it saturates: 1,024 views are 2 % faster
        (lambda n: min(n, 64) * 10.0, 64, 256),
        (lambda n: 100.0, LEAST, 32),
        (lambda n: n if n <= 128 else None, 128, 128),  # memory ends it
        (lambda n: None, LEAST, 0),
        (lambda n: 90.0 if n == 32 else n * 3.0, MOST, MOST),  # one size in vain is not the end
    ],
)
def test_the_batch_grows_until_memory_or_the_gain_ends(
    rate: Callable[[int], float | None], size: int, tried: int
) -> None:
    rates = measure(rate)
    assert useful_size(rates) == size and max(rates, default=0) == tried


def test_memory_of_a_gpu_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free on each GPU of the process, and an allocation that fails ends the search."""
    held, peak, others = [10 * GB, 2 * GB], [0, 0], [0, 0]

    def reset(gpu: int) -> None:
        peak[gpu] = held[gpu]

    def run(views: int) -> None:
        if views > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for gpu in (0, 1):
            peak[gpu] = max(peak[gpu], held[gpu] + views * GB // 8)

    for name, value in {
        "device_count": lambda: 2,
        "memory_allocated": lambda gpu: held[gpu],
        "max_memory_allocated": lambda gpu: peak[gpu],
        "reset_peak_memory_stats": reset,
        "memory_reserved": lambda gpu: held[gpu],
        "mem_get_info": lambda gpu: (20 * GB - held[gpu] - others[gpu], 20 * GB),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(batch_size, "_SECONDS", 0.0)
    device = torch.device("cuda")
    fits = {size: rate_on_gpu(run, size, device) is not None for size in (8, 32, 40, 48, 128)}
    assert fits == {8: True, 32: True, 40: True, 48: False, 128: False}  # 5 of the 10 GB that are free on the first
    others[1] = 11 * GB  # of another process
    assert rate_on_gpu(run, 32, device) is None and rate_on_gpu(run, 24, device) is not None
    config = batch_size.with_batch_size(load_config(sets=["cache.batch_size=auto"]), run, device)
    assert config.cache.batch_size in (8, 16, 32)


def test_a_cpu_has_a_fixed_one(world: Path, tmp_path: Path) -> None:
    """The default's; the output holds the number, and so a cache that is continued keeps it."""
    shards, place = str(world / "train" / "*.tar"), tmp_path / "c"
    cache_teacher(world_config(world, "cache.batch_size=auto"), shards, place)
    assert written(place) == load_config().cache.batch_size == 64
    with pytest.raises(UserError, match=r"started with cache\.batch_size 64, not 7"):
        cache_teacher(world_config(world, "cache.batch_size=7"), shards, place, "resume")
    with pytest.raises(UserError, match="cache.batch_size: input should be"):
        load_config(sets=["cache.batch_size=many"])


def test_a_cache_that_is_continued_keeps_its_batch_size(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, place = str(world / "train" / "*.tar"), tmp_path / "c"
    used: list[Config] = []
    fill = stage.fill_segments
    monkeypatch.setattr(stage, "fill_segments", lambda s, e, *a: used.append(e.config) or fill(s, e, *a))
    cache_teacher(world_config(world, "cache.batch_size=9"), shards, place)
    (journal, *_) = [name for name in open_store(place).sizes() if name.startswith(JOURNAL)]
    (place / journal).unlink()
    (place / "complete.json").unlink()
    result = cache_teacher(world_config(world, "cache.batch_size=auto"), shards, place, "resume")
    assert {config.cache.batch_size for config in used} == {9} and written(place) == 9 and result.records == 100


def written(place: Path) -> object:
    return load_config(place / "config.yaml").cache.batch_size
