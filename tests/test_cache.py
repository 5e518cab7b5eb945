"""The cache: format, codecs, exactness, crashes."""

import io
import json
import re
import signal
import tarfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr
from conftest import draw_images, make_vit, run_singer, seeded, tree_bytes, world_config
from forked import event, forked

from pipeline.cache import Cache, background_writer, extract
from pipeline.cache.format import JOURNAL
from pipeline.cache.info import cache_info
from pipeline.cache.manifest import Manifest, read_manifest
from pipeline.config import Config, dump_config, load_config
from pipeline.data import ImageFile, list_images
from pipeline.data.views import normalise
from pipeline.models.backbone import save_backbone
from pipeline.models.loading import load_saved
from pipeline.outputs.folder import claimed_output
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.verify import verify
from pipeline.storage import Store, open_store
from pipeline.storage.local import LocalStore
from pipeline.teachers.teacher import load_teacher
from singer.backbones import block_outputs
from singer.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden") / "cache-v4.json"


def fill(config: Config, world: Path, out: Path, mode: str = "new") -> Path:
    return cache_teacher(config, str(world / "train" / "*.tar"), out, mode).cache  # type: ignore[arg-type]


@pytest.fixture
def tiny_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 30)


def test_features_are_the_teachers(world: Path, config: Config) -> None:
    cache = Cache(world / "cache")
    teacher = load_saved(world / "teacher")
    records = np.array([3, 99, 0, 41])
    stored = cache.features(records, CPU)
    with ImageFile(cache.index.images) as files:
        pixels = cache.pixels(records, 32, files)
    images = normalise(pixels, teacher.mean, teacher.std)
    live = block_outputs(teacher.model, images, [2, 3])
    assert list(stored) == [2, 3]
    for block, x in stored.items():
        torch.testing.assert_close(x, live[block].half().float(), atol=2e-2, rtol=2e-3)
    logits = cache.suffix().logits(stored[3], 3)
    torch.testing.assert_close(logits, teacher.model(images), atol=2e-2, rtol=2e-2)


def test_scattered_reads_equal_a_whole_read(world: Path) -> None:
    cache = Cache(world / "cache")
    whole = cache.features(np.arange(len(cache)), CPU)
    order = np.random.default_rng(seeded(0)).permutation(len(cache))
    scattered = cache.features(order, CPU)
    for block in cache.blocks:
        assert torch.equal(scattered[block], whole[block][torch.from_numpy(order)])


def test_index(world: Path) -> None:
    cache = Cache(world / "cache")
    index = cache.index
    assert len(index) == len(cache) == 100 and len(set(index.images.keys)) == 100
    by_name = dict(zip(index.images.keys, index.images.labels, strict=True))
    assert all(key.startswith(f"class{label}/") for key, label in by_name.items())


def test_format_is_the_documented_one(world: Path) -> None:
    """Golden file: whatever changes here needs a new format version, or is a bug."""
    root = world / "cache"
    index = Cache(root).index
    manifest = json.loads((root / "manifest.json").read_text())
    for path in ("teacher.name", "teacher.weights", "data.hash"):
        section, key = path.split(".")
        manifest[section][key] = "..."
    manifest |= {"sha256": "...", "files": sorted(manifest["files"])}
    arrays = {}
    for name in ("2/values", "3/values"):
        arrays[name] = json.loads((root / "features" / name / "zarr.json").read_text())
    found = {
        "files": sorted(tree_bytes(root, "provenance.json", "config.yaml")),
        "manifest": manifest,
        "arrays": arrays,
        "journal": sorted(json.loads((root / JOURNAL / "000000.json").read_text())),
        "keys": list(index.images.keys[:2]),
        "box": index.box[0].tolist(),
    }
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written: look at it and commit it")
    assert found == json.loads(GOLDEN.read_text())


def test_caches_of_this_version_are_read() -> None:
    """What make_golden.py made once: every singer that reads this version of the format reads the same numbers."""
    folder = GOLDEN.parent
    cache = Cache(folder / "cache-v4-int4")
    expected = safetensors.torch.load_file(folder / "cache-v4-int4.expected.safetensors")
    records = np.arange(12)
    features, encoded = cache.features(records, CPU), cache.read(records)
    for block in (0, 1):
        torch.testing.assert_close(features[block], expected[f"features.{block}"], rtol=1e-6, atol=1e-6)
    assert encoded.positions is not None
    torch.testing.assert_close(encoded.positions, expected["positions"])
    torch.testing.assert_close(cache.suffix().logits(features[1], 1), expected["logits"])
    np.testing.assert_array_equal(cache.index.box, expected["box"].numpy())
    # JPEG decoders may differ in the last bit.
    torch.testing.assert_close(cache.pixels(records, 16).float(), expected["pixels"].float(), rtol=0, atol=2)
    assert verify(load_config(), folder / "cache-v4-int4").whole


def test_ids_hold() -> None:
    """Refiners and runs find the cache on which an earlier singer made them."""
    assert Cache(GOLDEN.parent / "cache-v4-int4").id.startswith("b6a92fa0d2aa")


def test_zarr_reads_it(world: Path) -> None:
    group = zarr.open_group(world / "cache", mode="r")
    array = group["features/3/values"]
    assert isinstance(array, zarr.Array)
    stored = Cache(world / "cache").read(np.arange(5)).blocks[3]["values"]
    np.testing.assert_array_equal(np.asarray(array[:5]), stored.numpy())


def test_int8_cache(world: Path, tmp_path: Path) -> None:
    exact = Cache(world / "cache")
    small = Cache(fill(world_config(world, "cache.codec=int8"), world, tmp_path / "c"))
    records = np.arange(len(exact))
    for block, x in exact.features(records, CPU).items():
        y = small.features(records, CPU)[block]
        assert float((y - x).norm() / x.norm()) < 0.02
    (info,) = cache_info(tmp_path / "c").teachers
    assert 1.2 < info.ratio < 2 and info.codec == "int8" and info.missing == 0  # 24 channels: much beside the codes
    assert info.fidelity[2]["clean"]["relative_error"] < 0.01 and info.fidelity[2]["artifact"]["cosine"] > 0.9999


@pytest.mark.usefixtures("tiny_shards")
def test_lost_and_cut_files_are_noticed(world: Path, config: Config, tmp_path: Path) -> None:
    out = fill(config, world, tmp_path / "c")
    whole = tree_bytes(out)
    (out / "features/2/values/c/1/0/0").unlink()
    cut = out / "features/3/values/c/2/0/0"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match="2 of 4 Zarr shards are missing"):
        Cache(out)
    fill(config, world, out, "resume")
    assert tree_bytes(out) == whole


def test_zeros_are_stored(world: Path, config: Config, tmp_path: Path) -> None:
    """A teacher whose block outputs are all zero still gives whole shards."""
    zero = make_vit()
    with torch.no_grad():
        for p in zero.model.parameters():
            p.zero_()
    save_backbone(zero, zero.model.state_dict(), tmp_path / "zero")
    silent = world_config(world, f"teacher.name=local-dir:{tmp_path / 'zero'}")
    cache = Cache(fill(silent, world, tmp_path / "c"))
    assert cache.features([5], CPU)[3].abs().max() == 0
    assert (tmp_path / "c" / "features/3/values/c/0/0/0").stat().st_size > 100 * 17 * 24 * 2


@pytest.mark.usefixtures("tiny_shards")
def test_resume_redoes_only_what_is_missing(world: Path, config: Config, tmp_path: Path) -> None:
    whole = fill(config, world, tmp_path / "whole")
    assert read_manifest(open_store(whole)).zarr_shards == 4
    part = fill(config, world, tmp_path / "part")
    kept = part / "features/2/values/c/0/0/0"
    before = kept.stat().st_mtime_ns
    for shard in (1, 3):
        (part / JOURNAL / f"{shard:06d}.json").unlink()
    (part / "features/2/values/c/1/0/0").write_bytes(b"torn")
    (part / "features/3/values/c/3/0/0").unlink()
    with pytest.raises(UserError, match="is incomplete: 2 of 4 Zarr shards are missing; repeat .* with --resume"):
        Cache(part)
    fill(config, world, part, "resume")
    assert kept.stat().st_mtime_ns == before
    ignored = ("provenance.json",)
    assert tree_bytes(part, *ignored) == tree_bytes(whole, *ignored)


def test_resume_with_other_settings_names_both_sides(world: Path, config: Config, tmp_path: Path) -> None:
    out = fill(config, world, tmp_path / "c")
    with pytest.raises(UserError, match=r"started with cache\.codec float16, not int8"):
        fill(world_config(world, "cache.codec=int8"), world, out, "resume")
    other = make_vit(seed=9)
    save_backbone(other, other.model.state_dict(), tmp_path / "other")
    changed = world_config(world, f"teacher.name=local-dir:{tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"its teacher\.weights is .*, this run has"):
        fill(changed, world, out, "resume")
    assert len(Cache(out)) == 100


def test_resume_with_other_settings_before_the_manifest(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt wrote of arrays that the second does not have would be bytes of no cache."""
    whole, out, write = fill(config, world, tmp_path / "whole"), tmp_path / "c", LocalStore.write

    def stops_before_the_manifest(store: LocalStore, name: str, *parts: bytes) -> None:
        if name == "manifest.json":
            raise KeyboardInterrupt
        write(store, name, *parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalStore, "write", stops_before_the_manifest)
        fill(world_config(world, "views.pixels=uint8", "cache.codec=int8"), world, out)
    assert (out / "pixels" / "zarr.json").is_file()
    fill(config, world, out, "resume")
    assert tree_bytes(out, "provenance.json") == tree_bytes(whole, "provenance.json")


def hold(out: Path, held: Event) -> None:
    with claimed_output(out, "resume", "cache-teacher", load_config(out / "config.yaml"), None):
        held.set()
        time.sleep(3600)


def test_second_writer_is_refused(world: Path, config: Config, tmp_path: Path) -> None:
    out = fill(config, world, tmp_path / "c")
    held = event()
    holder = forked(hold, out, held)
    holder.start()
    try:
        assert held.wait(200)
        for mode in ("resume", "overwrite"):
            with pytest.raises(UserError, match="is being written by another run"):
                fill(config, world, out, mode)
    finally:
        holder.kill()
        holder.join()
    assert len(Cache(fill(config, world, out, "resume"))) == 100
    assert not list(tmp_path.glob(".*"))


def stop_after_three_shards(command: list[str]) -> None:
    def stops(store: Store, manifest: Manifest, shard: int, *args: Any) -> None:
        write(store, manifest, shard, *args) if shard < 3 else time.sleep(3600)

    write = background_writer.write_zarr_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 10)
        patch.setattr(background_writer, "write_zarr_shard", stops)
        run_singer(patch, *command)


def test_kill_and_resume_gives_the_same_bytes(
    world: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of writing, where the journal has three of ten shards, then --resume."""
    monkeypatch.setattr("pipeline.cache.create.MAX_SHARD_RECORDS", 10)
    whole, part = fill(config, world, tmp_path / "whole"), tmp_path / "part"
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    options = ["--shards", world / "train" / "*.tar", "--out", part, "--config", file]
    process = forked(stop_after_three_shards, ["cache-teacher", *map(str, options)])
    process.start()
    try:
        while len(list(part.glob(f"{JOURNAL}/*.json"))) < 3 and process.is_alive():
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(part.glob(f"{JOURNAL}/*.json"))) == 3
    fill(config, world, part, "resume")
    assert tree_bytes(part, "provenance.json") == tree_bytes(whole, "provenance.json")


def test_nan_names_the_key(world: Path, tmp_path: Path) -> None:
    broken = load_teacher(world_config(world).teacher)
    broken.model.blocks[3].mlp.fc2.bias[0] = float("nan")
    save_backbone(broken, broken.model.state_dict(), tmp_path / "teacher")
    config = world_config(world, f"teacher.name=local-dir:{tmp_path / 'teacher'}")
    with pytest.raises(UserError, match="block 3 gives NaN or Inf for image 'class"):
        fill(config, world, tmp_path / "c")


def test_features_beyond_float16_name_the_block(world: Path, tmp_path: Path) -> None:
    """At calibration; the remedies work as printed."""
    large = load_teacher(world_config(world).teacher)
    large.model.blocks[3].mlp.fc2.bias[0] = 1e5
    save_backbone(large, large.model.state_dict(), tmp_path / "teacher")
    teacher = f"teacher.name=local-dir:{tmp_path / 'teacher'}"
    with pytest.raises(
        UserError, match=r"block 3: features reach .* beyond float16 \(65504\); use cache.codec bfloat16"
    ):
        fill(world_config(world, teacher, "cache.codec=float16"), world, tmp_path / "c")
    with pytest.raises(UserError, match="block 3 gives NaN or Inf .*run the teacher with .* teacher.dtype float32"):
        fill(world_config(world, teacher, "teacher.dtype=float16"), world, tmp_path / "c2")
    fill(world_config(world, teacher, "cache.codec=bfloat16"), world, tmp_path / "c3")


def test_wrong_blocks_write_nothing(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="block 7 does not exist: this model has 4 blocks"):
        fill(world_config(world, "cache.blocks=[7]"), world, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_image_that_was_repaired_after_it_was_refused_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found in the fill, when the images are listed; its size is that of the broken file."""
    monkeypatch.setattr(extract, "CALIBRATION_RECORDS", 2)
    draw_images(tmp_path / "photos", 1, 9)
    photos, out = str(tmp_path / "photos"), tmp_path / "c"
    config, skip = world_config(world, "views.count=1"), world_config(world, "views.count=1", "data.on_error=skip")
    order = list_images(config, photos).keys
    image = tmp_path / "photos" / f"{order[5]}.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:200])
    with pytest.raises(UserError, match="cannot be decoded: .*repair it and start anew, or go on without it: --res"):
        cache_teacher(config, photos, out)
    image.write_bytes(whole)
    with pytest.raises(UserError, match="has changed since it was listed: .* or go on without it: --resume"):
        cache_teacher(config, photos, out, "resume")
    made = cache_teacher(skip, photos, out, "resume")
    assert (made.records, made.skipped) == (8, 1) and order[5] not in set(Cache(out).index.images.keys)


def test_broken_images_are_refused_or_listed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "broken.tar"
    whole = (world / "train").glob("*000000.tar")
    with tarfile.open(next(whole)) as good, tarfile.open(shard, "w") as tar:
        for number, member in enumerate(m for m in good if m.isfile()):
            data = good.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".png") and number < 4:
                data, broken = data[: len(data) // 2], member.name.removesuffix(".png")
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    out = tmp_path / "c"
    command = ["cache-teacher", "--shards", shard, "--out", out]
    command += [f"--set=teacher.name=local-dir:{world / 'teacher'}", "--set=teacher.image_size=32"]
    assert run_singer(monkeypatch, *command) == 2
    refused = capfd.readouterr().err
    assert "cannot be decoded" in refused
    found = re.search(r"go on without it: (--resume --on-error skip) \((--append --on-error skip), if", refused)
    assert found is not None, refused
    assert run_singer(monkeypatch, *command, *found[1].split(), "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result["skipped"] == len(json.loads((out / "skipped.json").read_text()))
    out = tmp_path / "whole"
    made = cache_teacher(world_config(world, "data.on_error=skip"), str(shard), out)
    listed = json.loads((out / "skipped.json").read_text())
    assert broken in [entry["key"] for entry in listed]
    assert made.skipped == len(listed) and made.records == 30 - len(listed)
    assert broken not in set(Cache(out).index.images.keys)
