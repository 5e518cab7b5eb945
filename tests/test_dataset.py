"""A cache as a map-style data set in a plain DataLoader of torch."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SIZE, seeded, world_config
from torch.utils.data import DataLoader

from pipeline import Cache, cache_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of some patches of each record, with the views, in int4."""
    out = tmp_path_factory.mktemp("sampled") / "cache"
    sets = ["cache.token_share=0.5", "views.pixels=uint8", "cache.codec=int4"]
    cache_teacher(world_config(world, *sets), str(world / "train" / "*.tar"), out)
    return out


def test_a_record(world: Path, sampled: Path) -> None:
    cache = Cache(world / "cache")
    record = cache[7]
    assert set(record) == {"record", "key", "label", "features"} and record["record"] == 7
    image = cache.index.image[7]
    assert (record["key"], record["label"]) == (cache.index.images.keys[image], cache.index.images.labels[image])
    for block, x in cache.features([7], CPU).items():
        assert torch.equal(record["features"][block], x[0])
    assert torch.equal(cache[-1]["features"][3], cache[len(cache) - 1]["features"][3])
    with pytest.raises(IndexError, match="numbered 0 to 99"):
        cache[100]
    small = Cache(sampled)
    assert small[0]["pixels"].shape == (SIZE, SIZE, 3) and small[0]["positions"].shape == (8,)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_workers_give_what_is_stored(sampled: Path, context: str) -> None:
    """In any start method, while this process has files of the cache open."""
    cache = Cache(sampled)
    expected = cache.features(range(len(cache)), CPU)
    loader: DataLoader[Any] = DataLoader(
        cache,  # type: ignore[arg-type]
        batch_size=9,
        shuffle=True,
        generator=torch.Generator().manual_seed(seeded(0)),
        num_workers=2,
        multiprocessing_context=context,
    )
    seen: list[int] = []
    for batch in loader:
        records = batch["record"].tolist()
        seen += records
        for block, x in batch["features"].items():
            # Workers compute with one thread, and round as one.
            torch.testing.assert_close(x, expected[block][records])
        assert np.array_equal(batch["label"], cache.index.images.labels[cache.index.image[records]])
        assert torch.equal(batch["pixels"], cache.pixels(records, SIZE))
    assert sorted(seen) == list(range(len(cache)))


def test_a_copy_is_opened_as_the_original(world: Path) -> None:
    cache = Cache(world / "cache", blocks=[3])
    again = copy.copy(cache)
    assert again is not cache and (again.id, again.blocks, len(again)) == (cache.id, (3,), len(cache))
