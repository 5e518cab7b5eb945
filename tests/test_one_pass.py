"""Images are read in the pass that feeds the teacher, once; a resume repeats nothing; opening does not grow."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded, shards, tree_bytes, world_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.cache import Cache
from pipeline.cache.extract import Extractor
from pipeline.cache.format import COMPLETE, JOURNAL
from pipeline.config import Config, ViewsConfig
from pipeline.data import ImageFile, Keys, index_images
from pipeline.data.tar_members import plain_file
from pipeline.data.views import draw_view
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from pipeline.storage import LocalStore
from singer.errors import UserError

CPU = torch.device("cpu")
BROKEN = (3, 4, 17, 29)


def write_shards(folder: Path, count: int, each: int, broken: tuple[int, ...] = ()) -> str:
    """Small images whose key is their number; the broken ones are cut short."""
    folder.mkdir()
    rng = np.random.default_rng(seeded(0))
    for shard in range(count):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, "PNG")
                data = buffer.getvalue()[: 60 if number in broken else None]
                for name, content in ((f"{number:05d}.png", data), (f"{number:05d}.cls", b"%d" % (number % 5))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "*.tar")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 10)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all images that are read from here on."""
    found: list[int] = []
    encoded = ImageFile.encoded

    def counted(self: ImageFile, number: int, most: int | None = None) -> tuple[bytes, str]:
        found.append(number)
        return encoded(self, number, most)

    monkeypatch.setattr(ImageFile, "encoded", counted)
    return found


def test_broken_images_are_passed_over(world: Path, tmp_path: Path, small_shards: None) -> None:
    """Records of whole images are numbered without gaps, and are what they are in a cache of whole images alone."""
    spec = write_shards(tmp_path / "in", 4, 10, BROKEN)
    config = world_config(world, "data.on_error=skip", "views.count=2", "views.kind=random-resized-crop")
    result = cache_teacher(config, spec, tmp_path / "c")
    good = [n for n in range(40) if n not in BROKEN]
    cache = Cache(tmp_path / "c")
    assert result.skipped == len(BROKEN) and result.records == len(cache) == 2 * len(good)
    assert list(cache.index.images.keys) == [f"{n:05d}" for n in good]
    assert cache.index.image.tolist() == [n for n in range(len(good)) for _ in range(2)]
    assert cache.index.images.labels.tolist() == [n % 5 for n in good]
    listed = json.loads((tmp_path / "c" / "skipped.json").read_text())
    assert [(s["shard"], s["key"]) for s in listed] == [(f"{n // 10:04d}.tar", f"{n:05d}") for n in BROKEN]
    assert all(s["reason"].startswith("cannot be decoded: ") for s in listed)
    # A cache of the same images, where the broken ones were never there.
    alone = tmp_path / "alone"
    alone.mkdir()
    for shard in range(4):
        with (
            tarfile.open(tmp_path / "in" / f"{shard:04d}.tar") as old,
            tarfile.open(alone / f"{shard:04d}.tar", "w") as new,
        ):
            for member in old:
                if int(member.name.split(".")[0]) not in BROKEN:
                    new.addfile(member, old.extractfile(member))
    cache_teacher(config, str(alone / "*.tar"), tmp_path / "d")
    other = Cache(tmp_path / "d")
    assert cache.index.digest.tolist() == other.index.digest.tolist() and (cache.index.box == other.index.box).all()
    order = np.random.default_rng(seeded(1)).permutation(len(cache))
    for block, x in cache.features(order, CPU).items():
        torch.testing.assert_close(x, other.features(order, CPU)[block], atol=2e-2, rtol=2e-2)
    assert verify(config, tmp_path / "c", live=True, sample=20).whole
    with pytest.raises(UserError, match="has no record 72"):
        cache.read([72])


def test_a_cache_with_broken_images_grows_and_is_repaired(
    world: Path, tmp_path: Path, small_shards: None, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_shards(tmp_path / "in", 4, 10, BROKEN)
    skip = "data.on_error=skip"
    cache_teacher(world_config(world, skip, "cache.blocks=[3]"), spec, tmp_path / "c")
    cache_teacher(world_config(world, skip, "cache.blocks=[2]"), spec, tmp_path / "c", "append")
    whole = tree_bytes(tmp_path / "c")
    cache = Cache(tmp_path / "c")
    exact = Cache(cache_teacher(world_config(world, skip), spec, tmp_path / "d").cache)
    assert cache.blocks == exact.blocks == (2, 3) and len(cache) == len(exact) == 40 - len(BROKEN)
    for block, x in cache.features(np.arange(36), CPU).items():
        torch.testing.assert_close(x, exact.features(np.arange(36), CPU)[block], atol=2e-2, rtol=2e-2)
    # What could not be read is not taken for new images.
    capfd.readouterr()
    cache_teacher(world_config(world, skip), spec, tmp_path / "c", "append")
    assert "the cache already holds everything" in capfd.readouterr().err and tree_bytes(tmp_path / "c") == whole
    for name in ("features/3/values/c/1/0/0", "parts/001/views/c/2/0", "parts/001/complete.json"):
        (tmp_path / "c" / name).write_bytes(b"torn")
    verify(world_config(world, skip), tmp_path / "c", repair=True, sample=4).check()
    assert tree_bytes(tmp_path / "c") == whole


def test_nothing_but_broken_images(world: Path, tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "in", 1, 5, (0, 1, 2, 3, 4))
    with pytest.raises(UserError, match="none of 5 sampled images can be decoded; the first is '00000': "):
        cache_teacher(world_config(world, "data.on_error=skip"), spec, tmp_path / "c")


def test_the_teacher_begins_before_all_images_are_read(
    world: Path, config: Config, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is read once for the features, and a fixed sample for the calibration."""
    spec = write_shards(tmp_path / "in", 40, 10)
    read_by_then: list[int] = []
    features = Extractor.features

    def watched(self: Extractor, *arguments: Any) -> dict[int, torch.Tensor]:
        read_by_then.append(len(reads))
        return features(self, *arguments)

    monkeypatch.setattr(Extractor, "features", watched)
    cache_teacher(config, spec, tmp_path / "c")
    # Some batches ahead, however many images there are.
    assert read_by_then[0] <= 7 * 5
    sample = np.linspace(0, 399, 256).round().astype(int)
    times = np.bincount(reads, minlength=400)
    assert (times - np.isin(np.arange(400), sample)).tolist() == [1] * 400


@pytest.mark.usefixtures("small_shards")
def test_a_resume_repeats_nothing(
    world: Path, config: Config, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the headers of the tars nor the images whose features are there are read again."""
    out = tmp_path / "c"
    cache_teacher(config, shards(world), out)
    whole = tree_bytes(out, "provenance.json")
    for name in (COMPLETE, "records.safetensors", f"{JOURNAL}/000002.json", f"{JOURNAL}/000007.json"):
        (out / name).unlink()
    reads.clear()

    def refuse(*_: object) -> None:
        raise AssertionError("the tars are listed again")

    monkeypatch.setattr("pipeline.stages.cache_teacher.list_images", refuse)
    result = cache_teacher(config, shards(world), out, "resume")
    assert sorted(reads) == [*range(20, 30), *range(70, 80)] and result.records == 100
    assert tree_bytes(out, "provenance.json") == whole
    reads.clear()
    cache_teacher(config, shards(world), out, "resume")
    assert reads == [] and tree_bytes(out, "provenance.json") == whole


def test_opening_does_not_grow_with_shards(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of a hundred shards takes as many reads to open as one of four."""
    counts = []
    read, listed = LocalStore.read, LocalStore.sizes

    def counted(self: LocalStore, name: str) -> bytes:
        counts[-1] += 1
        return read(self, name)

    def counted_sizes(self: LocalStore, prefix: str = "") -> dict[str, int]:
        counts[-1] += 1
        return listed(self, prefix)

    for records in (30, 1):
        monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", records)
        cache_teacher(config, shards(world), tmp_path / str(records))
    monkeypatch.setattr(LocalStore, "read", counted)
    monkeypatch.setattr(LocalStore, "sizes", counted_sizes)
    for records in (30, 1):
        counts.append(0)
        cache = Cache(tmp_path / str(records))
        assert len(cache.index) == 100
    assert counts[0] == counts[1] < 12


def test_a_lost_journal_entry_of_a_complete_cache_is_noticed(world: Path, config: Config, tmp_path: Path) -> None:
    cache_teacher(config, shards(world), tmp_path / "c")
    (tmp_path / "c" / JOURNAL / "000000.json").unlink()
    with pytest.raises(UserError, match="1 of 1 Zarr shards are missing"):
        Cache(tmp_path / "c")


def test_an_image_that_changed_within_a_resumed_run_is_named(world: Path, tmp_path: Path, small_shards: None) -> None:
    """A block that is added must see what the others saw."""
    spec = write_shards(tmp_path / "in", 2, 10)
    cache_teacher(world_config(world, "cache.blocks=[3]"), spec, tmp_path / "c")
    images = index_images(spec)
    path, place = images.paths[1], int(images.offset[13] + images.size[13] - 4)
    data = bytearray(path.read_bytes())
    data[place] ^= 1  # of the checksum at the end of a PNG, which decoders pass over
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="image '00013' has changed since it was cached"):
        cache_teacher(world_config(world, "cache.blocks=[2]"), spec, tmp_path / "c", "append")


def test_listing_in_processes_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_shards(tmp_path / "in", 8, 5)
    (tmp_path / "in" / "0003.tar").write_bytes((tmp_path / "in" / "0001.tar").read_bytes())  # keys twice
    (tmp_path / "in" / "0006.tar").write_bytes(b"no tar")
    alone = index_images(spec, "skip")
    monkeypatch.setattr("pipeline.data.image_index._MANY_SOURCES", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    together = index_images(spec, "skip")
    assert alone.keys == together.keys and alone.skipped == together.skipped and alone.paths == together.paths
    for name in ("labels", "container", "offset", "size"):
        assert getattr(alone, name).tolist() == getattr(together, name).tolist()
    assert [s.reason for s in alone.skipped] == ["ends in the middle of a header"]
    assert len(alone) == 35 and [key for key in alone.keys if "/" in key] == [f"0003/{key}" for key in alone.keys[5:10]]


def test_a_centred_view_draws_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = draw_view(ViewsConfig(flip=1.0), "a", 0, (30, 20))

    def refuse(*_: object) -> None:
        raise AssertionError("numbers are drawn")

    monkeypatch.setattr("pipeline.data.views.generator", refuse)
    view = draw_view(ViewsConfig(), "a", 0, (30, 20))
    assert view.box == before.box and not view.flip and view.color is None


names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=99)


@given(names, st.integers(0, 8**11 - 1), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]), st.data())
def test_plain_headers_are_what_tarfile_says(name: str, size: int, form: int, data: st.DataObject) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    block = bytearray(info.tobuf(form)[:512])
    for _ in range(data.draw(st.integers(0, 2))):
        block[data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    found = plain_file(bytes(block))
    if found is not None:
        header = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
        assert (header.name, header.size, header.isreg()) == (*found, True)
    if data.draw(st.booleans()):
        block[148] ^= 1
        assert plain_file(bytes(block)) is None


@given(st.lists(st.text(max_size=6), max_size=30), st.data())
def test_keys(keys: list[str], data: st.DataObject) -> None:
    stored = Keys.of(keys)
    rows = data.draw(st.lists(st.integers(0, len(keys) - 1), max_size=40)) if keys else []
    assert list(stored.select(np.array(rows, dtype=np.int64))) == [keys[r] for r in rows]
    cut = data.draw(st.integers(0, len(keys)))
    assert Keys.join([Keys.of(keys[:cut]), Keys.of(keys[cut:])]) == stored
    assert [int(h) for h in stored.hashes()] == [int(h) for key in keys for h in Keys.of([key]).hashes()]


def test_a_broken_image_that_is_appended_is_left_out_as_printed(
    world: Path, tmp_path: Path, small_shards: None
) -> None:
    first = write_shards(tmp_path / "a", 1, 10)
    write_shards(tmp_path / "b", 3, 10, (23,))
    config = world_config(world)
    cache_teacher(config, first, tmp_path / "c")
    rest = [str(tmp_path / "b" / f"{n:04d}.tar") for n in (1, 2)]
    with pytest.raises(UserError, match=r"\(--append --on-error skip, if it was being appended\)"):
        cache_teacher(config, rest, tmp_path / "c", "append")
    cache_teacher(world_config(world, "data.on_error=skip"), rest, tmp_path / "c", "append")
    assert len(Cache(tmp_path / "c")) == 29
