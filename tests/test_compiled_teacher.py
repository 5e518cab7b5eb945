"""A compiled teacher makes the cache that it makes as it is, by one graph, and does without where it has to."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tree_bytes, world_config
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import OperatorIssue

from pipeline.cache import extract as extracting
from pipeline.cache.extract import Extractor
from pipeline.runtime.compiling import Compilable
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from pipeline.teachers.teacher import load_teacher
from singer.errors import UserError

Outputs = Callable[[Tensor, Sequence[int]], dict[int, Tensor]]
DIFFERING = ("provenance.json", "config.yaml")


def test_one_graph_for_a_whole_cache(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches have 7, 6 and 2 views. A repair compiles too, as the cache was made; a live check does not."""
    graphs: list[torch.fx.GraphModule] = []
    passes: list[Tensor] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def compiled(plain: Outputs) -> Outputs:
        run = compiler(plain)
        return lambda images, blocks: passes.append(images) or run(images, blocks)

    compiler = partial(torch.compile, backend=count)
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    place = tmp_path / "cache"
    cache_teacher(world_config(world, "cache.compile=true"), str(world / "train" / "*.tar"), place)
    assert len(graphs) == 1 and len(passes) == 30
    assert tree_bytes(place, *DIFFERING) == tree_bytes(world / "cache", *DIFFERING)

    assert verify(world_config(world, "cache.compile=true"), place, live=True, sample=4).whole
    assert len(passes) == 30
    next((place / "features" / "3").rglob("c/*/*/*")).unlink()
    assert verify(world_config(world), place, repair=True, sample=4).whole
    assert len(passes) == 45
    assert tree_bytes(place, *DIFFERING) == tree_bytes(world / "cache", *DIFFERING)


@pytest.mark.parametrize("error", [TorchDynamoException, OperatorIssue])
def test_a_compiler_that_fails(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    """The cache is made without it, after one note; if it was asked for, this is an error."""

    def broken(*_: object) -> None:
        raise error("there is no compiler")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    monkeypatch.setattr(extracting, "Compilable", lambda plain, wanted, able, key: Compilable(plain, wanted, True, key))
    shards = str(world / "train" / "*.tar")
    cache_teacher(world_config(world), shards, tmp_path / "auto")
    said = capfd.readouterr().err
    note = "note: torch.compile does not work here (there is no compiler); cache.compile auto goes on without it"
    assert said.count("torch.compile") == 1 and note in " ".join(said.split())
    assert tree_bytes(tmp_path / "auto", *DIFFERING) == tree_bytes(world / "cache", *DIFFERING)
    with pytest.raises(UserError, match="does not work here .*; do without it: --set cache.compile=false"):
        cache_teacher(world_config(world, "cache.compile=true"), shards, tmp_path / "true")


def test_auto_is_for_teachers_on_one_gpu(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(extracting, "Compilable", lambda plain, wanted, able, key: asked.append(able))
    config = world_config(world, "cache.compile=false")
    extract = Extractor(config, load_teacher(config.teacher), torch.device("cpu"))
    extract.device = torch.device("cuda")
    for offload in ("none", "auto", "cpu"):
        extract.configured(world_config(world, f"teacher.offload={offload}"))
    assert asked == [False, True, False, False]


def test_a_cache_is_continued_as_it_was_begun(world: Path, tmp_path: Path) -> None:
    """A compiled teacher may differ in the last bits."""
    shards = str(world / "train" / "*.tar")
    cache_teacher(world_config(world), shards, tmp_path / "c")
    with pytest.raises(UserError, match=r"started with cache\.compile auto, not False"):
        cache_teacher(world_config(world, "cache.compile=false"), shards, tmp_path / "c", "resume")
