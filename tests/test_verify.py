"""Verifying a cache: whatever is damaged is found and named, and what can be computed again is repaired to the byte."""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_vit, plant_artifacts, seeded, shards, tree_bytes, world_config

from pipeline.cache.extract import Extractor
from pipeline.cache.format import CALIBRATION, COMPLETE, IMAGES, RECORDS, TAIL
from pipeline.cache.index import read_images
from pipeline.config import Config, load_config
from pipeline.models.backbone import save_backbone
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.runtime.logs import is_log
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import SegmentReport, VerifyResult, verify
from pipeline.storage import LocalStore
from singer.errors import UserError

# Random views, sampled tokens, codes, byte strings and two arrays of pixels: every kind of file.
SETTINGS = ("views.kind=random-resized-crop", "views.count=2", "cache.token_share=0.5", "cache.codec=int4")


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 30)
        yield


@pytest.fixture(scope="module")
def caches(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """plain: four shards of float16; rich: two parts of everything that the format knows."""
    root = tmp_path_factory.mktemp("verify")
    cache_teacher(world_config(world), shards(world), root / "plain")
    rich = world_config(world, *SETTINGS, "views.pixels=jpeg", "cache.blocks=[3]")
    cache_teacher(rich, shards(world), root / "rich")
    cache_teacher(world_config(world, *SETTINGS, "cache.blocks=[2]"), shards(world), root / "rich", "append")
    return {"plain": root / "plain", "rich": root / "rich"}


@pytest.fixture
def cache(caches: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain cache, to be damaged."""
    return Path(shutil.copytree(caches["plain"], tmp_path / "cache"))


@pytest.fixture
def rich(caches: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(caches["rich"], tmp_path / "rich"))


def check(place: Path) -> VerifyResult:
    return verify(load_config(), place)


def only(result: VerifyResult) -> SegmentReport:
    (report,) = result.parts
    return report


def test_whole_caches_pass(caches: dict[str, Path]) -> None:
    for place in caches.values():
        before = tree_bytes(place)
        result = check(place)
        result.check()
        assert result.whole and not any(r.files or r.missing or r.damaged for r in result.parts)
        assert sum(r.checked_files for r in result.parts) == len(before)
        assert sum(r.checked_bytes for r in result.parts) == sum(map(len, before.values()))
        assert tree_bytes(place) == before
    assert [r.part for r in check(caches["rich"]).parts] == [".", "parts/001"]


def test_every_flipped_byte_is_found_and_named(rich: Path) -> None:
    """At a random place of every file, and more in the small ones; blanks and checksums too."""
    rng = random.Random(seeded(0))
    files = sorted(f for f in rich.rglob("*") if f.is_file() and not is_log(f.name))
    assert len(files) > 50
    for file in files + rng.choices([f for f in files if f.suffix in (".json", ".yaml")], k=10):
        data = file.read_bytes()
        at = rng.randrange(len(data))
        name = str(file.relative_to(rich))
        file.write_bytes(data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :])
        try:
            assert name in {n for r in check(rich).parts for n in r.files}, (name, at)
        except UserError as error:  # of a manifest without which nothing can be checked
            assert file.name == CACHE_MANIFEST and str(file) in str(error), (name, at)
        file.write_bytes(data)
    assert check(rich).whole


@pytest.mark.parametrize("byte", [b" ", b"\t", b"\r"])
def test_blanks_count(cache: Path, byte: bytes) -> None:
    """A change that leaves the JSON value as it was."""
    for name in (CACHE_MANIFEST, COMPLETE, "provenance.json", "journal/000001.json"):
        data = (cache / name).read_bytes()
        (cache / name).write_bytes(data[:-1] + byte)
        assert only(check(cache)).files == {name: "damaged"}
        (cache / name).write_bytes(data)


# name: (damage, damaged shards, {file: a part of the reason})
Damage = tuple[Callable[[Path], object], list[int], dict[str, str]]
FIRST, SECOND = "features/2/values/c/1/0/0", "features/3/values/c/3/0/0"
DAMAGES: dict[str, Damage] = {
    "cut": (lambda c: (c / FIRST).write_bytes((c / FIRST).read_bytes()[:-1]), [1], {FIRST: "bytes, not"}),
    "longer": (lambda c: (c / FIRST).write_bytes((c / FIRST).read_bytes() + b"0"), [1], {FIRST: "bytes, not"}),
    "lost": (lambda c: (c / SECOND).unlink(), [3], {SECOND: "missing"}),
    "two": (
        lambda c: ((c / SECOND).unlink(), (c / FIRST).write_bytes(b"")),
        [1, 3],
        {FIRST: "bytes, not", SECOND: "missing"},
    ),
    "swapped shards": (
        lambda c: swap(c / FIRST, c / "features/2/values/c/0/0/0"),
        [0, 1],
        {FIRST: "damaged", "features/2/values/c/0/0/0": "damaged"},
    ),
    "swapped blocks": (
        lambda c: swap(c / FIRST, c / "features/3/values/c/1/0/0"),
        [1],
        {FIRST: "damaged", "features/3/values/c/1/0/0": "damaged"},
    ),
    "swapped journal entries": (
        lambda c: swap(c / "journal/000000.json", c / "journal/000002.json"),
        [0, 2],
        {"journal/000000.json": "damaged", "journal/000002.json": "damaged"},
    ),
    "empty journal entry": (
        lambda c: (c / "journal/000002.json").write_bytes(b"{}"),
        [2],
        {"journal/000002.json": "damaged"},
    ),
    "surplus shard": (
        lambda c: shutil.copytree(c / "features/2/values/c/1", c / "features/2/values/c/9"),
        [],
        {"features/2/values/c/9/0/0": "unknown"},
    ),
    "stranger": (lambda c: (c / "notes.txt").write_text("hello"), [], {"notes.txt": "unknown"}),
    "lost list of images": (lambda c: (c / IMAGES).unlink(), [], {IMAGES: "missing"}),
    "lost records": (lambda c: (c / RECORDS).unlink(), [], {RECORDS: "missing"}),
    "lost end": (lambda c: (c / COMPLETE).unlink(), [], {COMPLETE: "missing"}),
    "swapped ends": (lambda c: swap(c / COMPLETE, c / RECORDS), [], {COMPLETE: "damaged", RECORDS: "damaged"}),
    "stranger's skipped.json": (lambda c: (c / "skipped.json").write_text("[]"), [], {"skipped.json": "unknown"}),
    "lost config": (lambda c: (c / "config.yaml").unlink(), [], {"config.yaml": "missing"}),
    "swapped small files": (
        lambda c: swap(c / TAIL, c / CALIBRATION),
        [],
        {TAIL: "damaged", CALIBRATION: "damaged"},
    ),
}


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, cache: Path) -> None:
    damage, numbers, files = DAMAGES[name]
    damage(cache)
    result = check(cache)
    report = only(result)
    assert not result.whole and report.missing == [] and report.damaged == numbers
    assert set(report.files) == set(files)
    assert all(why in report.files[file] for file, why in files.items())
    with pytest.raises(UserError) as raised:
        result.check()
    expected = [f"{len(numbers)} of 4 Zarr shards of {cache}"] if numbers else [str(cache / file) for file in files]
    assert all(part in str(raised.value) for part in expected)


def test_unreadable_files_are_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = LocalStore.read

    def fails(self: LocalStore, name: str) -> bytes:
        if name == FIRST:
            raise OSError(5, "Input/output error", name)
        return read(self, name)

    monkeypatch.setattr(LocalStore, "read", fails)
    report = only(check(cache))
    assert report.damaged == [1] and report.files == {FIRST: "unreadable: Input/output error"}


def test_an_incomplete_cache_lists_what_is_missing(cache: Path) -> None:
    for shard in (1, 2):
        (cache / f"journal/{shard:06d}.json").unlink()
    (cache / FIRST).unlink()
    (cache / SECOND).unlink()
    report = only(check(cache))
    assert (report.missing, report.damaged, report.files) == ([1, 2], [3], {SECOND: "missing"})


def test_lost_parts_are_named(world: Path, rich: Path) -> None:
    added = world_config(world, *SETTINGS, "cache.blocks=[1]")
    cache_teacher(added, shards(world), rich, "append")
    assert check(rich).whole
    (rich / "parts/002/manifest.json").unlink()
    with pytest.raises(UserError, match=r"parts/002/manifest.json is missing; repeat .* --append"):
        check(rich).check()
    (rich / "parts/001/manifest.json").rename(rich / "parts/stray")
    assert check(rich).parts[0].files == {"parts/001/manifest.json": "missing", "parts/stray": "unknown"}


def test_reading_takes_no_lock(cache: Path) -> None:
    with LocalStore(cache).lock():
        assert check(cache).whole
        with pytest.raises(UserError, match="is being written by another run"):
            verify(load_config(), cache, repair=True)


def test_live_features_are_compared(world: Path, caches: dict[str, Path]) -> None:
    """Codecs with loss, several views, sampled tokens and parts; the teacher by name or by its weights alone."""
    for place, gate in ((caches["plain"], 0.999), (caches["rich"], 0.99)):
        result = verify(world_config(world), place, live=True, sample=20)
        result.check()
        for report in result.parts:
            assert report.live is not None and report.live.records == 20
            assert report.live.gate == gate <= report.live.worst < 1 + 1e-6
            for figures in report.live.blocks.values():
                assert figures["clean"]["relative_error"] < (0.001 if gate == 0.999 else 0.2)
    weights = world / "teacher" / "model.safetensors"
    (live,) = [
        r.live for r in verify(load_config(sets=[f"teacher.weights={weights}"]), caches["plain"], live=True).parts
    ]
    assert live is not None and live.records == 64 and live.blocks[2]["artifact"]["cosine"] > 0.999


def test_wrong_teacher_names_both_sides(world: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    other = make_vit(seed=9)
    save_backbone(other, other.model.state_dict(), tmp_path / "other")
    with pytest.raises(
        UserError, match=r"the cache's teacher\.weights is .*/teacher\), here it is .*model\.safetensors"
    ):
        verify(
            world_config(world, f"teacher.weights={tmp_path / 'other' / 'model.safetensors'}"),
            caches["plain"],
            live=True,
        )
    with pytest.raises(UserError, match="here it is .*local-dir:.*/other"):
        verify(load_config(sets=[f"teacher.name=local-dir:{tmp_path / 'other'}"]), caches["plain"], live=True)


def test_features_of_something_else_are_found(world: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checksums fit, but what was stored is not what the teacher computes."""
    shutil.rmtree(cache)
    features = Extractor.features

    def wrong(
        self: Extractor, pixels: torch.Tensor, blocks: list[int], copies: torch.Tensor | None
    ) -> dict[int, torch.Tensor]:
        return features(self, pixels.flip(0), blocks, copies)

    monkeypatch.setattr(Extractor, "features", wrong)
    cache_teacher(world_config(world), shards(world), cache)
    monkeypatch.setattr(Extractor, "features", features)
    assert check(cache).whole
    result = verify(world_config(world), cache, live=True, sample=16)
    with pytest.raises(UserError, match=r"\d+ of 16 records of .* image 'class\d/\d+' has cosine 0\.\d+ at block \d"):
        result.check()


def test_several_teachers(world: Path, cache: Path, tmp_path: Path) -> None:
    other = make_vit(seed=9, embed_dim=32)
    plant_artifacts(other)
    save_backbone(other, other.model.state_dict(), tmp_path / "other")
    second = world_config(world, f"teacher.name=local-dir:{tmp_path / 'other'}")
    cache_teacher(second, shards(world), cache, "append")
    for config, checked in ((world_config(world), [True, False]), (second, [False, True])):
        result = verify(config, cache, live=True, sample=8)
        assert result.whole and [r.live is not None for r in result.parts] == checked


def repaired(config: Config, place: Path, damaged: set[str], **options: object) -> VerifyResult:
    """Repair, and check that the bytes are the old ones and no other file was touched."""
    before = {f: f.stat().st_mtime_ns for f in place.rglob("*") if f.is_file()}
    result = verify(config, place, repair=True, sample=8, **options)  # type: ignore[arg-type]
    touched = {
        str(f.relative_to(place)) for f in place.rglob("*") if f.is_file() and before.get(f) != f.stat().st_mtime_ns
    }
    assert touched == damaged
    return result


def of_shard(place: Path, shard: int, part: str = "") -> set[str]:
    """The files of a shard."""
    names = [name.removeprefix(part) for name in tree_bytes(place) if name.startswith(part)]
    found = re.compile(rf"(features/.*|positions|pixels|views)/c/{shard}(/0)*|journal/{shard:06d}.json")
    return {part + name for name in names if found.fullmatch(name)}


def test_repair_computes_exactly_what_is_damaged(world: Path, cache: Path) -> None:
    """With other batches than the cache's in the configuration; lost, flipped and never finished shards."""
    whole = tree_bytes(cache)
    wanted = set().union(*(of_shard(cache, s) for s in (0, 1, 3)))
    assert len(wanted) == 12
    (cache / FIRST).write_bytes(whole[FIRST].replace(b"\0", b"\1"))
    (cache / SECOND).unlink()
    (cache / "journal/000000.json").unlink()
    (cache / TAIL).write_bytes(b"torn")
    (cache / "features/3/zarr.json").write_bytes(b"{}")
    config = world_config(world, "cache.batch_size=64")
    result = repaired(config, cache, wanted | {TAIL, "features/3/zarr.json", COMPLETE, RECORDS})
    result.check()
    assert only(result).repaired == [0, 1, 3] and only(result).live is not None
    assert tree_bytes(cache) == whole
    assert only(repaired(config, cache, set())).repaired == []


def test_repair_of_everything_the_format_knows(world: Path, rich: Path) -> None:
    whole = tree_bytes(rich)
    journal, strings = "parts/001/journal/000002.json", "features/3/outliers/c/4"
    wanted = of_shard(rich, 4) | of_shard(rich, 2, "parts/001/")
    assert len(wanted) == 6 + 5 and {journal, strings} < wanted
    wanted |= {f"{part}{name}" for part in ("", "parts/001/") for name in (COMPLETE, RECORDS)}
    (rich / journal).write_bytes(whole[journal].replace(b"1", b"2", 1))
    (rich / strings).unlink()
    result = repaired(world_config(world), rich, wanted)
    result.check()
    assert [r.repaired for r in result.parts] == [[4], [2]]
    assert tree_bytes(rich) == whole


def test_repair_finds_shards_that_have_moved(world: Path, cache: Path, tmp_path: Path) -> None:
    """And refuses images that are not the cached ones, before anything is written."""
    whole = tree_bytes(cache)
    (cache / FIRST).unlink()
    damaged = tree_bytes(cache)
    moved = Path(shutil.copytree(world / "train", tmp_path / "moved"))
    images = read_images(LocalStore(cache))
    offset, path = int(images.offset[40]), moved / images.paths[int(images.container[40])].name
    data = path.read_bytes()
    path.write_bytes(data[: offset + 60] + bytes([data[offset + 60] ^ 1]) + data[offset + 61 :])
    with pytest.raises(UserError, match=r"image 'class.*moved.* is not the one that was cached"):
        verify(world_config(world), cache, repair=True, images=str(moved / "*.tar"))
    assert tree_bytes(cache) == damaged
    path.write_bytes(data)
    assert verify(world_config(world), cache, repair=True, images=str(moved / "*.tar")).whole
    assert tree_bytes(cache) == whole


@pytest.mark.parametrize("name", [IMAGES, CALIBRATION, "fidelity.json", "provenance.json"])
def test_what_cannot_be_computed_is_named(world: Path, cache: Path, name: str) -> None:
    (cache / name).write_bytes(b"{}")
    (cache / FIRST).unlink()
    result = verify(world_config(world), cache, repair=True, sample=8)
    # Shards need the list of images and the calibration, not the rest.
    needed = name in (IMAGES, CALIBRATION)
    assert only(result).damaged == ([1] if needed else []) and only(result).files[name] == "damaged"
    with pytest.raises(UserError, match=rf"{name} is damaged; this cannot be computed again: restore it"):
        result.check()
    assert (cache / name).read_bytes() == b"{}"
