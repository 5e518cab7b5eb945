"""Growing a cache: blocks, images, views and teachers are added, and nothing that is there is computed again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images, make_vit, seeded, shards, tree_bytes, world_config
from PIL import Image

from pipeline.cache import Cache, view_reader
from pipeline.config import Config
from pipeline.models.backbone import save_backbone
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.prepare import prepare
from pipeline.stages.refine import refine
from singer.errors import UserError

CPU = torch.device("cpu")
RANDOM_VIEWS = ("views.kind=random-resized-crop", "views.flip=0.5", "views.color=[0.4,0.4,0.2,0.1]")


def make(config: Config, shards: str | list[str], out: Path, mode: str = "new") -> Cache:
    cache_teacher(config, shards, out, mode)  # type: ignore[arg-type]
    return Cache(out)


def same_features(one: Cache, other: Cache, records: np.ndarray | None = None) -> None:
    """The features of the same records by key and view are equal, whatever their order."""
    assert one.blocks == other.blocks
    places = {(other.index.key(r), int(other.index.view[r])): r for r in range(len(other))}
    chosen = np.arange(len(one)) if records is None else records
    theirs = np.array([places[one.index.key(r), int(one.index.view[r])] for r in chosen])
    for block, x in one.features(chosen, CPU).items():
        torch.testing.assert_close(x, other.features(theirs, CPU)[block], atol=2e-3, rtol=2e-3)


def test_blocks(world: Path, tmp_path: Path) -> None:
    small = make(world_config(world, "cache.blocks=[2]"), shards(world), tmp_path / "c")
    before = tree_bytes(tmp_path / "c")
    grown = make(world_config(world, "cache.blocks=[1,3]"), shards(world), tmp_path / "c", "append")
    assert grown.blocks == (1, 2, 3) and len(grown) == len(small) == 100
    same_features(grown, make(world_config(world, "cache.blocks=[1,2,3]"), shards(world), tmp_path / "whole"))
    after = tree_bytes(tmp_path / "c")
    assert {name: after[name] for name in before} == before
    assert grown.id != small.id and small.id in grown.ids
    # The tail now begins at the earlier block.
    logits = grown.suffix().logits(grown.features([5], CPU)[1], 1)
    torch.testing.assert_close(logits, grown.suffix().logits(grown.features([5], CPU)[3], 3), atol=2e-2, rtol=2e-2)
    assert Cache(tmp_path / "c", blocks=[2]).blocks == (2,)


def test_appending_again_adds_nothing(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = world_config(world, "cache.blocks=[2,3]")
    make(config, shards(world), tmp_path / "c")
    before = tree_bytes(tmp_path / "c")
    make(config, shards(world), tmp_path / "c", "append")
    assert tree_bytes(tmp_path / "c") == before
    assert "the cache already holds everything" in capfd.readouterr().err


def test_images(world: Path, config: Config, tmp_path: Path) -> None:
    first, rest = str(world / "train" / "*000000.tar"), str(world / "train" / "*00000[123].tar")
    small = make(config, first, tmp_path / "c")
    grown = make(config, rest, tmp_path / "c", "append")
    assert (len(small), len(grown)) == (30, 100)
    whole = Cache(world / "cache")
    # Same teacher, same images; the codec's statistics do not matter to float16.
    same_features(grown, whole)
    assert sorted(grown.index.images.keys) == sorted(whole.index.images.keys)
    order = np.random.default_rng(seeded(0)).permutation(100)
    shuffled = grown.features(order, CPU)[3]
    assert torch.equal(shuffled, grown.features(np.arange(100), CPU)[3][torch.from_numpy(order)])


def test_all_at_once_and_a_codec_with_outliers(world: Path, tmp_path: Path) -> None:
    """Images, views and blocks in one command; byte strings are put together from several parts."""
    sets = [*RANDOM_VIEWS, "cache.codec=int4"]
    first = str(world / "train" / "*000000.tar")
    make(world_config(world, "cache.blocks=[3]", *sets), first, tmp_path / "c")
    config = world_config(world, "cache.blocks=[2,3]", "views.count=2", *sets)
    grown = make(config, shards(world), tmp_path / "c", "append")
    assert len(grown) == 200 and grown.blocks == (2, 3)
    whole = make(config, shards(world), tmp_path / "whole")
    seen = {(grown.index.key(r), int(grown.index.view[r])) for r in range(200)}
    assert seen == {(whole.index.key(r), int(whole.index.view[r])) for r in range(200)}
    order = np.random.default_rng(seeded(0)).permutation(200)
    for block, x in grown.features(order, CPU).items():
        assert torch.equal(x, grown.features(np.arange(200), CPU)[block][torch.from_numpy(order)])
        exact = {(whole.index.key(r), int(whole.index.view[r])): r for r in range(200)}
        y = whole.features([exact[grown.index.key(r), int(grown.index.view[r])] for r in order.tolist()], CPU)[block]
        assert torch.nn.functional.cosine_similarity(x, y, dim=-1).mean() > 0.97


def test_every_new_class_gets_a_number_of_its_own(world: Path, config: Config, tmp_path: Path) -> None:
    for n, name in enumerate(("cat", "zebra", "yak")):
        draw_images(tmp_path / f"{n}", 1, 3, seed=n)
        (tmp_path / f"{n}" / "class0").rename(tmp_path / f"{n}" / name)
        for file in (tmp_path / f"{n}" / name).iterdir():
            file.rename(file.with_name(f"{n}{file.name}"))
        grown = make(config, str(tmp_path / f"{n}"), tmp_path / "c", "append" if n else "new")
    assert grown.index.images.classes == ("cat", "zebra", "yak") and sorted({*grown.index.images.labels.tolist()}) == [
        0,
        1,
        2,
    ]


def test_views_of_every_segment_are_replayed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn again for a new block, also where other views of the same images came first."""
    first, place = str(world / "train" / "*000000.tar"), tmp_path / "c"
    for count in (1, 2):
        config = world_config(world, "cache.blocks=[3]", f"views.count={count}", *RANDOM_VIEWS)
        make(config, first, place, "new" if count == 1 else "append")
    monkeypatch.setattr(view_reader, "draw_view", None)
    grown = make(world_config(world, "cache.blocks=[2,3]", "views.count=2", *RANDOM_VIEWS), first, place, "append")
    assert len(grown) == 60 and grown.blocks == (2, 3)


def test_second_teacher(world: Path, config: Config, tmp_path: Path) -> None:
    other = make_vit(seed=5, embed_dim=12, patch_size=16)
    save_backbone(other, other.model.state_dict(), tmp_path / "other")
    make(config, shards(world), tmp_path / "c")
    second = world_config(world, f"teacher.name=local-dir:{tmp_path / 'other'}", "cache.blocks=[3]")
    cache_teacher(second, shards(world), tmp_path / "c", "append")
    first = Cache(tmp_path / "c")
    assert first.manifest.teacher.width == 24 and first.id == Cache(world / "cache").id
    small = Cache(tmp_path / "c", teacher=second.teacher.name)
    assert (small.blocks, small.features([7], CPU)[3].shape) == ((3,), (1, 5, 12))
    alone = make(second, shards(world), tmp_path / "alone")
    same_features(small, alone)
    with pytest.raises(UserError, match="has no features of a teacher 'x'; it has: vit_.*@.{8} .name local-dir"):
        Cache(tmp_path / "c", teacher="x")
    refine(
        second.changed(refine={"teacher": second.teacher.name}),
        tmp_path / "c",
        tmp_path / "adapters",
    )
    # The adapters know their teacher.
    run = distill(config, tmp_path / "c", tmp_path / "run", tmp_path / "adapters")
    assert (list(run.teachers[0].matching), run.teachers[0].cache) == ([3], small.id)


def test_adapters_outlive_growth(world: Path, config: Config, tmp_path: Path) -> None:
    make(config, shards(world), tmp_path / "c")
    refine(config, tmp_path / "c", tmp_path / "adapters")
    make(world_config(world, "cache.blocks=[1]"), shards(world), tmp_path / "c", "append")
    run = distill(config, tmp_path / "c", tmp_path / "run", tmp_path / "adapters")
    assert list(run.teachers[0].matching) == [2, 3]
    with pytest.raises(UserError, match=r"was fitted to blocks \[2, 3\], not to \[1, 2\]"):
        distill(config.changed(distill={"blocks": (1, 2)}), tmp_path / "c", tmp_path / "r2", tmp_path / "adapters")


def test_what_does_not_go_together(world: Path, config: Config, tmp_path: Path) -> None:
    first, rest = str(world / "train" / "*000000.tar"), str(world / "train" / "*00000[123].tar")
    out = tmp_path / "c"
    with pytest.raises(UserError, match="does not exist; there is nothing to append to"):
        make(config, first, out, "append")
    make(config, first, out)
    before = tree_bytes(out)
    with pytest.raises(UserError, match="cannot be appended to: its codec is float16, this run has int8"):
        make(world_config(world, "cache.codec=int8"), rest, out, "append")
    with pytest.raises(UserError, match=r"cannot be appended to: its views\.crop is 1\.0, this run has 0\.5"):
        make(world_config(world, "views.crop=0.5"), rest, out, "append")
    with pytest.raises(UserError, match=r"block 1 must be added for all images; --images gives none of .*000000"):
        make(world_config(world, "cache.blocks=[1,2,3]"), rest, out, "append")
    assert tree_bytes(out) == before


def test_changed_and_missing_images_are_named(world: Path, config: Config, tmp_path: Path) -> None:
    draw_images(tmp_path / "in", 2, 3)
    one = tmp_path / "in" / "class1" / "2.png"
    prepare(config, tmp_path / "in", tmp_path / "a")
    make(config, str(tmp_path / "a" / "*.tar"), tmp_path / "c")
    blocks = world_config(world, "cache.blocks=[1]")
    one.write_bytes((tmp_path / "in" / "class0" / "2.png").read_bytes())
    prepare(config, tmp_path / "in", tmp_path / "b")
    with pytest.raises(UserError, match="image 'class1/2' has changed since it was cached"):
        make(blocks, str(tmp_path / "b" / "*.tar"), tmp_path / "c", "append")
    one.unlink()
    prepare(config, tmp_path / "in", tmp_path / "d")
    with pytest.raises(UserError, match="gives some of the images of .* but not 'class1/2'"):
        make(blocks, str(tmp_path / "d" / "*.tar"), tmp_path / "c", "append")


def test_other_images_of_the_same_names_and_sizes_are_not_the_cached_ones(
    world: Path, config: Config, tmp_path: Path
) -> None:
    """Files of one size, as of a camera; with both folders, keys are told apart."""
    draw = np.random.default_rng(seeded(8))
    for day in ("day1", "day2"):
        (tmp_path / day).mkdir()
        for n in range(4):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / day / f"{n}.bmp")
    one, two = str(tmp_path / "day1"), str(tmp_path / "day2")
    make(config, one, tmp_path / "c")
    with pytest.raises(UserError, match=r"' has changed since it was cached, or \S+day2 has another one") as told:
        make(config, two, tmp_path / "c", "append")
    assert "give the earlier --images, too, before the new ones" in str(told.value)
    make(config, [one, two], tmp_path / "c", "append")
    assert {*Cache(tmp_path / "c").index.images.keys} == {f"{folder}{n}" for folder in ("", "day2/") for n in range(4)}
    # A folder that moved holds the same ones.
    (tmp_path / "day1").rename(tmp_path / "day3")
    make(world_config(world, "cache.blocks=[1,2,3]"), [str(tmp_path / "day3"), two], tmp_path / "c", "append")


def test_interrupted_growth(world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old cache stays readable, and the same command goes on."""
    monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 30)
    old = make(config, shards(world), tmp_path / "c")
    more = world_config(world, "cache.blocks=[1]")
    grown = make(more, shards(world), tmp_path / "c", "append")
    whole = tree_bytes(tmp_path / "c")
    journal = tmp_path / "c" / "parts" / "001" / "journal"
    for shard in (1, 3):
        (journal / f"{shard:06d}.json").unlink()
    assert Cache(tmp_path / "c").id == old.id
    assert make(more, shards(world), tmp_path / "c", "append").id == grown.id
    assert tree_bytes(tmp_path / "c") == whole
