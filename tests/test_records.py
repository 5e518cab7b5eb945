"""What a record is: a view of an image replayed exactly, its stored pixels, and the patches that were sampled."""

import json
import re
import shutil
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
import yaml
from conftest import seeded, targets_of, world_config

from pipeline.cache import Cache
from pipeline.cache.append import Addition
from pipeline.cache.format import zarr_shard_file
from pipeline.cache.manifest import read_manifest
from pipeline.cache.pixel_choice import with_pixels
from pipeline.cache.segments import read_segments
from pipeline.cache.stored import Fixed, Ragged
from pipeline.cache.zarr_shards import ZarrArray, read_arrays
from pipeline.config import Config, load_config
from pipeline.data import ImageFile
from pipeline.data.views import apply_view, normalise
from pipeline.models.loading import load_saved
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.runtime import buffers
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.refine import refine
from pipeline.storage import LocalStore, open_store
from pipeline.storage.json_files import json_bytes, sealed
from pipeline.students.new import new_student
from pipeline.training.distilling.targets import Targets
from pipeline.training.refining.stored_refiners import load_refiner
from singer.backbones import block_outputs
from singer.errors import UserError
from singer.tokens import take_patches

CPU = torch.device("cpu")
RANDOM_VIEWS = ("views.kind=random-resized-crop", "views.count=3", "views.flip=0.5", "views.color=[0.4,0.4,0.2,0.1]")


def make(config: Config, world: Path, out: Path) -> Cache:
    cache_teacher(config, str(world / "train" / "*.tar"), out)
    return Cache(out)


@pytest.fixture(scope="module")
def views(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("views") / "cache"
    return make(world_config(world, *RANDOM_VIEWS, "views.pixels=uint8"), world, out)


def live(world: Path, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    teacher = load_saved(world / "teacher")
    return block_outputs(teacher.model, normalise(pixels, teacher.mean, teacher.std), [2, 3])


def test_views_are_replayed_exactly(world: Path, views: Cache) -> None:
    """The teacher's features are those of the very views that the student gets, flipped and coloured ones too."""
    assert len(views) == 300 and [views.index.view[r] for r in range(4)] == [0, 1, 2, 0]
    flipped = np.flatnonzero(views.index.flip)
    assert 100 < len(flipped) < 200
    records = np.concatenate([flipped[:3], np.flatnonzero(~views.index.flip)[:3]])
    with ImageFile(views.index.images) as files:
        drawn = torch.from_numpy(np.stack([replay(files, views, int(r)) for r in records]))
    assert torch.equal(drawn, views.pixels(records, 32))
    for block, x in live(world, drawn).items():
        torch.testing.assert_close(views.features(records, CPU)[block], x, atol=2e-2, rtol=2e-3)
    # A mirrored grid of tokens is something else than the features of the mirrored image.
    mirrored = live(world, drawn[:3].flip(2))[3][:, 1:].unflatten(1, (4, 4)).flip(2).flatten(1, 2)
    assert (mirrored - views.features(records[:3], CPU)[3][:, 1:]).abs().mean() > 0.05


def replay(files: ImageFile, cache: Cache, record: int) -> np.ndarray:
    index = cache.index
    return apply_view(files.read(int(index.image[record])), index.record_view(record), 32)


def test_three_views_of_an_image_differ(views: Cache) -> None:
    pixels = views.pixels(np.arange(3), 32).float()
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (pixels[a] - pixels[b]).abs().mean() > 1
    assert len({tuple(b) for b in views.index.box.tolist()}) == 300


@pytest.mark.parametrize("kind", ["uint8", "jpeg"])
def test_students_need_no_images(world: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A student whose input is larger than the stored views is told so."""
    size, notes = (32, 0) if kind == "uint8" else (64, 1)
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in (world / "train").glob("*.tar"):
        (shards / shard.name).write_bytes(shard.read_bytes())
    config = world_config(world, *RANDOM_VIEWS, f"views.pixels={kind}", "views.pixel_size=48", "distill.epochs=1",
                          f"student.image_size={size}")  # fmt: skip
    cache_teacher(config, str(shards / "*.tar"), tmp_path / "c")
    cache = Cache(tmp_path / "c")
    with ImageFile(cache.index.images) as files:
        exact = apply_view(files.read(7), cache.index.record_view(21), 48).astype(int)
    for shard in shards.glob("*.tar"):
        shard.unlink()
    stored = cache.pixels([21], 48)[0].numpy().astype(int)
    assert np.abs(stored - exact).mean() <= (0 if kind == "uint8" else 6)
    assert cache.pixels([3, 1], 32).shape == (2, 32, 32, 3)
    assert distill(config, tmp_path / "c", tmp_path / "run").steps == 19
    assert capfd.readouterr().err.count("are enlarged to the student's 64; to show it more") == notes


def kind_of(out: Path) -> str | None:
    """What the manifest says of stored views; the stored configuration says the same."""
    pixels = read_manifest(open_store(out)).pixels
    kind = "none" if pixels is None else pixels.kind
    assert yaml.safe_load((out / "config.yaml").read_text())["views"]["pixels"] == kind
    return kind


def test_views_are_stored_where_the_disk_has_room(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was found at the beginning holds for all that is added, however full the disk is then."""
    config, shards = world_config(world, "views.pixels=auto", "views.flip=0.5"), str(world / "train" / "*.tar")
    record = 2 * 17 * 24 * 2 + 32 * 32 * 3 + 33
    for free, kind in ((2 * 100 * record - 2, "none"), (2 * 100 * record, "uint8")):
        monkeypatch.setattr("pipeline.cache.pixel_choice.free_bytes", lambda _, free=free: free)
        cache_teacher(config, shards, tmp_path / kind)
        assert kind_of(tmp_path / kind) == kind
        assert capfd.readouterr().err.count("so students decode the images") == (kind == "none")
    monkeypatch.setattr("pipeline.cache.pixel_choice.free_bytes", lambda _: 0)
    cache_teacher(config, shards, tmp_path / "uint8", "resume")
    two = world_config(world, "views.pixels=auto", "views.flip=0.5", "views.count=2")
    for kind in ("none", "uint8"):
        cache_teacher(two, shards, tmp_path / kind, "append")
        assert len(Cache(tmp_path / kind)) == 200 and Cache(tmp_path / kind).has_pixels == (kind == "uint8")
    with pytest.raises(UserError, match="views.pixels"):
        cache_teacher(world_config(world, "views.flip=0.5"), shards, tmp_path / "uint8", "resume")


def test_views_of_another_size_are_added_at_this_size(world: Path, tmp_path: Path) -> None:
    shards = str(world / "train" / "*.tar")
    first = world_config(world, "views.pixels=jpeg", "views.pixel_size=24", "views.flip=0.5")
    cache_teacher(first, shards, tmp_path / "c")
    cache_teacher(world_config(world, "views.pixels=auto", "views.flip=0.5", "views.count=2"), shards, tmp_path / "c",
                  "append")  # fmt: skip
    added = read_manifest(open_store(tmp_path / "c").child("parts/001")).pixels
    assert added is not None and (added.kind, added.size) == ("jpeg", 24)


@pytest.mark.parametrize("sets", [("views.pixels=jpeg", "views.jpeg_quality=50"), ("views.pixels=uint8",)])
@pytest.mark.parametrize("size", [24, 32])
def test_views_left_open_are_those_of_the_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], size: int
) -> None:
    """Resumed or added to, size and quality are taken from it; another one that is given is refused, with a remedy."""
    train, test = (str(world / split / "*.tar") for split in ("train", "test"))
    begun = world_config(world, "cache.blocks=[3]", *sets, f"views.pixel_size={size}")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.cache_teacher.fill_segments", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_teacher(begun, train, tmp_path / "c")
    config = world_config(world, "cache.blocks=[3]", "views.pixels=auto")
    other = world_config(world, "cache.blocks=[3]", "views.pixels=auto", "views.pixel_size=16")
    own = re.escape(str(tmp_path / "c" / "config.yaml"))
    with pytest.raises(UserError, match=f"views.pixel_size {size}, not 16; repeat its command, or give --config {own}"):
        cache_teacher(other, train, tmp_path / "c", "resume")
    cache_teacher(config, train, tmp_path / "c", "resume")
    cache_teacher(config, test, tmp_path / "c", "append")
    first, added = (s.manifest.pixels for s in read_segments(open_store(tmp_path / "c")))
    assert first == added and first is not None and first.size == size
    assert first.quality == (50 if "views.pixels=jpeg" in sets else None)
    # The remedy works.
    cache_teacher(load_config(tmp_path / "c" / "config.yaml"), train, tmp_path / "c", "resume")


def killed(*args: object) -> int:
    raise KeyboardInterrupt


def test_a_larger_teacher_adds_views_of_the_cache_s_size(world: Path, tmp_path: Path) -> None:
    train, test = (str(world / split / "*.tar") for split in ("train", "test"))
    sets = ["views.pixels=auto", "cache.blocks=[3]"]
    cache_teacher(world_config(world, *sets), train, tmp_path / "c")
    larger = world_config(world, *sets, "teacher.image_size=64")
    for images in (train, test):
        cache_teacher(larger, images, tmp_path / "c", "append")
    kinds = [(s.manifest.pixels.kind, s.manifest.pixels.size) for s in read_segments(open_store(tmp_path / "c"))
             if s.manifest.pixels is not None]  # fmt: skip
    assert kinds == [("uint8", 32), ("uint8", 32)]


def test_what_is_overwritten_makes_room(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards = world_config(world, "views.pixels=auto"), str(world / "train" / "*.tar")
    cache_teacher(config, shards, tmp_path / "c")
    there = sum(open_store(tmp_path / "c").sizes().values())
    monkeypatch.setattr("pipeline.cache.pixel_choice.free_bytes", lambda _: there)
    cache_teacher(config, shards, tmp_path / "c", "overwrite")
    assert kind_of(tmp_path / "c") == "uint8"


def test_object_stores_get_no_views_by_themselves(world: Path) -> None:
    manifest, images = Cache(world / "cache").manifest, Cache(world / "cache").index.images
    whole = Addition((2, 3), images, 0, 1)
    config = world_config(world, "views.pixels=auto")
    for out in ("s3://bucket/cache", None):
        assert with_pixels(config, whole, manifest.teacher, out).views.pixels == "none"


def test_sampled_tokens(world: Path, tmp_path: Path) -> None:
    whole = Cache(world / "cache")
    config = world_config(world, "cache.token_share=0.5", "cache.codec=int8", "distill.epochs=1")
    half = make(config, world, tmp_path / "c")
    records = np.array([5, 99, 0])
    encoded = half.read(records)
    assert encoded.positions is not None and encoded.positions.shape == (3, 8)
    for row in encoded.positions.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 16
    assert len({tuple(row) for row in half.read(np.arange(100)).positions.tolist()}) > 90  # type: ignore[union-attr]
    for block, x in half.decode(encoded, CPU).items():
        expected = take_patches(whole.features(records, CPU)[block], 1, encoded.positions)
        assert x.shape == (3, 9, 24)
        assert (x - expected).norm() / expected.norm() < 0.01
    refine(config, tmp_path / "c", tmp_path / "a")
    assert distill(config, tmp_path / "c", tmp_path / "run", tmp_path / "a").steps == 7


@pytest.mark.parametrize("patch_size", [8, 16])
def test_targets_of_sampled_tokens_meet_the_right_student_tokens(world: Path, tmp_path: Path, patch_size: int) -> None:
    """A student that outputs the teacher's features, on its grid or a coarser one, meets its targets."""
    config = world_config(world, "cache.token_share=0.4", f"student.patch_size={patch_size}")
    cache = make(config, world, tmp_path / "c")
    student = new_student(config.student, 32)
    targets = Targets(cache, None, student, CPU)
    encoded = cache.read([4, 8])
    grid = (32 // patch_size,) * 2
    # A ramp over the grid, resized to the teacher's: its value at a patch tells which one it is.
    rows = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, -1, 1).expand(2, -1, 24)
    met = targets.student_tokens({3: torch.cat([torch.full((2, 1, 24), -1.0), rows], 1)}, {3: grid}, encoded.positions)[
        3
    ]
    assert met.shape == targets_of(targets, encoded)[3].shape == (2, 1 + 6, 24)
    assert (met[:, 0] == -1).all()
    assert encoded.positions is not None
    if grid == (4, 4):
        assert torch.equal(met[:, 1:, 0].to(torch.int16), encoded.positions)
    else:
        upper = encoded.positions < 8
        assert met[:, 1:, 0][upper].mean() < met[:, 1:, 0][~upper].mean()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 3}, "has cache format version 3, not 4; make it again with cache-teacher --overwrite"),
        ({"version": 5}, "has cache format version 5, not 4; install a newer singer"),
    ],
)
def test_caches_that_are_not_read_any_more(world: Path, tmp_path: Path, change: dict[str, object], reason: str) -> None:
    """They are refused in one line, and the remedy works as printed."""
    place = Path(shutil.copytree(world / "cache", tmp_path / "c"))
    manifest = json.loads((place / CACHE_MANIFEST).read_text())
    del manifest["sha256"]
    (place / CACHE_MANIFEST).write_bytes(json_bytes(sealed(manifest | change)))
    with pytest.raises(UserError, match=f"{place} {reason}"):
        Cache(place)
    cache_teacher(world_config(world), str(world / "train" / "*000003.tar"), place, "overwrite")
    assert len(Cache(place)) == 10


def test_views_settings_are_checked(world: Path) -> None:
    with pytest.raises(UserError, match="center views are all alike"):
        world_config(world, "views.count=2")
    with pytest.raises(UserError, match=r"scale: 0\.9 is larger than 0\.1"):
        world_config(world, "views.scale=[0.9,0.1]")


def test_refiner_knows_its_cache(world: Path, views: Cache) -> None:
    with pytest.raises(UserError, match="was fitted to cache .* run singer refine on this cache"):
        load_refiner(world / "adapters", views)


def test_what_is_read_together_is_split_as_if_read_apart(world: Path, tmp_path: Path) -> None:
    """Outliers of any number a record, and sampled positions; also none at all of a part."""
    cache_teacher(
        world_config(world, "cache.codec=int4", "cache.token_share=0.5"), str(world / "train" / "*.tar"), tmp_path / "c"
    )
    cache = Cache(tmp_path / "c")
    records, counts = np.random.default_rng(seeded(0)).permutation(100)[:30], [1, 12, 0, 17]
    device, start = torch.device("cpu"), 0
    outliers = 0
    for part, count in zip(cache.read(records).split(counts), counts, strict=True):
        alone = cache.read(records[start : start + count])
        assert part.positions is not None and alone.positions is not None
        assert torch.equal(part.positions, alone.positions)
        for block, x in cache.decode(alone, device).items():
            assert torch.equal(cache.decode(part, device)[block], x)
            ragged = part.blocks[block]["outliers"]
            assert isinstance(ragged, Ragged) and len(ragged.lengths) == count
            outliers += len(ragged.data)
        start += count
    assert outliers


def stored_array(folder: Path, form: Fixed | None, index: np.ndarray, payload: bytes) -> ZarrArray:
    """Of four records in two shards of three, whose first has this index, under a right checksum."""
    store, encoded = LocalStore(folder), index.astype("<i8").tobytes()
    for shard in range(2):
        name = zarr_shard_file("a", form, shard)
        store.write(name, payload, encoded, struct.pack("<I", google_crc32c.value(encoded)))
    return ZarrArray(store, "a", form, 4, 3, store.sizes())


def test_records_in_any_order_within_a_shard(tmp_path: Path) -> None:
    payload = bytes(range(12))
    array = stored_array(tmp_path, Fixed((4,), "uint8"), np.array([[8, 4], [0, 4], [4, 4]]), payload)
    whole = read_arrays([(array, np.array([3, 2, 1, 0]), np.array([0, 1, 2, 3]))], 4)
    assert isinstance(whole, torch.Tensor)
    assert whole.tolist() == [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3], [8, 9, 10, 11]]


@pytest.mark.parametrize("form", [Fixed((4,), "uint8"), None])
@pytest.mark.parametrize("wrong", [(0, 3), (0, 5), (0, -1), (-1, 4), (62, 4), (2**62, 2**62), (2**63 - 1, 4), (-1, -1)])
def test_an_index_that_cannot_be_right_is_refused(tmp_path: Path, form: Fixed | None, wrong: tuple[int, int]) -> None:
    """Its sizes say how much is written to memory."""
    rows = [[0, 8], [8, 8], [16, 8]] if form is None else [[0, 4], [4, 4], [8, 4]]
    array = stored_array(tmp_path, form, np.array([*rows[:2], wrong]), bytes(12))
    with pytest.raises(UserError, match="is damaged; run singer cache verify"):
        read_arrays([(array, np.array([0, 1]), np.array([0, 1]))], 2)


@pytest.mark.parametrize("sets", [["cache.codec=int4", "cache.token_share=0.5"], []])
def test_no_records_are_read_as_such(world: Path, tmp_path: Path, sets: list[str]) -> None:
    """Also as the first that are read of a cache."""
    cache_teacher(world_config(world, *sets), str(world / "train" / "*.tar"), tmp_path / "c")
    for _ in range(2):
        cache = Cache(tmp_path / "c")
        for block, x in cache.features([], torch.device("cpu")).items():
            assert x.shape == (0, *cache.features([3], torch.device("cpu"))[block].shape[1:])
    for wrong in (-1, len(cache)):
        with pytest.raises(UserError, match=f"has no record {wrong}: they are numbered 0 to {len(cache) - 1}"):
            cache.read([3, wrong])


def test_buffers_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing that shares their memory is left, and not before."""
    monkeypatch.setattr(buffers, "_free", {})  # whatever other tests have left
    address = buffers.empty((3, 5), "float16").data_ptr()
    first = buffers.empty((3, 5), "float16")
    assert first.data_ptr() == address
    views = [first[1:].numpy()[:, 2:], first.view(torch.int16).flatten()]
    del first
    for _ in range(2):
        assert buffers.empty((3, 5), "float16").data_ptr() != address
        views.pop()
    assert address in [b.data_ptr() for b in [buffers.empty((3, 5), "float16") for _ in range(2)]]


def test_memory_is_pinned_only_where_a_gpu_is_used(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a DataLoader, forked on a machine with a GPU, may not touch it."""
    pinned = list[bool]()

    def pin(*shape: object, pin_memory: bool = False, **more: object) -> torch.Tensor:
        pinned.append(pin_memory)
        return zeros(*shape, **more)  # type: ignore[call-overload, no-any-return]

    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Cache(world / "cache").read([0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch, "empty", pin)
        assert buffers.empty((2, 3), "uint8").tolist() == [[0, 0, 0]] * 2
    assert pinned == [True]


def test_pool_of_buffers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes that do not come again, none is kept beyond the bound; those in use are never given away."""
    monkeypatch.setattr(buffers, "_free", {})
    monkeypatch.setattr(buffers, "_KEPT_BYTES", 10 << 16)
    held = buffers.empty((1 << 16,), "uint8").fill_(7)
    for pages in [*range(1, 12), *range(1, 12)]:
        buffers.empty((pages << 16,), "uint8").fill_(1)
        assert buffers.kept_bytes() <= 10 << 16
    assert bool((held == 7).all())


def test_a_buffer_that_has_no_room_replaces_what_was_unused_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window keeps its memory, however many sizes byte strings have."""
    monkeypatch.setattr(buffers, "_free", {})
    monkeypatch.setattr(buffers, "_KEPT_BYTES", 10 << 16)
    for pages in (3, 2, 3, 6, 6):
        address = buffers.empty((pages << 16,), "uint8").data_ptr()
    assert buffers.kept_bytes() == 9 << 16
    assert buffers.empty((6 << 16,), "uint8").data_ptr() == address
