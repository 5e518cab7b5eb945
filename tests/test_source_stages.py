"""Every stage works from folders, lists and URLs as from shards, and what messages advise works as printed."""

import functools
import http.server
import os
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import run_singer, seeded, tree_bytes, world_config
from PIL import Image
from tars import png, write_tar

from pipeline.cache import Cache
from pipeline.data import index_images, resolve
from pipeline.planning.plan import plan
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import distill
from pipeline.stages.evaluate import evaluate
from pipeline.stages.verify import verify
from pipeline.storage import open_store
from singer.errors import UserError


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a folder that has moved since; tests only read it."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(world / "images" / "train", root / "photos")
    cache_teacher(world_config(world), root / "photos", root / "cache")
    (root / "photos").rename(root / "moved")
    return root


def test_a_folder_gives_what_its_shards_give(world: Path, made: Path) -> None:
    """Keys, order, labels and features; and the bytes of every array."""
    here, there = Cache(made / "cache").index, Cache(world / "cache").index
    assert here.images.keys == there.images.keys and here.images.labels.tolist() == there.images.labels.tolist()
    assert here.digest.tolist() == there.digest.tolist() and here.images.files is not None
    assert here.images.classes == ("class0", "class1", "class2", "class3")
    arrays = [name for name in tree_bytes(made / "cache") if name.startswith(("features/", "views/"))]
    folder, shards = tree_bytes(made / "cache"), tree_bytes(world / "cache")
    assert len(arrays) > 3 and all(folder[name] == shards[name] for name in arrays)
    assert "image.file_end" not in str((world / "cache" / "images.safetensors").read_bytes()[:2000])


def test_stages_find_a_folder_that_moved(world: Path, made: Path, tmp_path: Path) -> None:
    config = world_config(world, "distill.epochs=1")
    with pytest.raises(UserError, match="photos of the cache is gone; if it has moved, give its place with --images"):
        distill(config, made / "cache", tmp_path / "run")
    run = distill(config, made / "cache", tmp_path / "run", images=str(made / "moved"))
    assert run.student.is_dir()
    live = verify(config, made / "cache", live=True, images=str(made / "moved"), sample=5)
    live.check()
    train, test = world / "images" / "train", world / "images" / "test"
    specs = [(train, test), (world / "train", world / "test")]
    alike = [evaluate(config, tmp_path / "run", str(learn), str(probe)) for learn, probe in specs]
    assert alike[0].linear == alike[1].linear and alike[0].train_images == 100


def test_other_images_of_the_same_names_and_sizes_train_no_student(world: Path, tmp_path: Path) -> None:
    """Their features are cached, and their pixels are others'; nothing but their bytes tells them apart."""
    draw = np.random.default_rng(seeded(9))
    for folder in ("mine", "others"):
        (tmp_path / folder).mkdir()
        for n in range(6):
            image = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(tmp_path / folder / f"{n}.bmp")
    config = world_config(world, "distill.epochs=1", "distill.batch_size=3")
    cache_teacher(config, tmp_path / "mine", tmp_path / "cache")
    with pytest.raises(UserError, match=r"others\S* .*is not the one that was cached; give its place with --images"):
        distill(config, tmp_path / "cache", tmp_path / "run", images=str(tmp_path / "others"))
    assert not (tmp_path / "run" / "student").exists()


def test_a_folder_is_resumed_and_appended_to(world: Path, tmp_path: Path) -> None:
    """Also with a class that the cache did not have: the others keep their numbers."""
    photos, out = tmp_path / "photos", tmp_path / "cache"
    for name in ("class1", "class2"):
        shutil.copytree(world / "images" / "test" / name, photos / name)
    config = world_config(world, "cache.shard_mb=1")
    cache_teacher(config, photos, out)
    whole = tree_bytes(out)
    for entry in (out / "journal").iterdir():
        entry.unlink()
    (out / "complete.json").unlink()
    photos.rename(tmp_path / "moved")
    cache_teacher(config, tmp_path / "moved", out, "resume")
    assert tree_bytes(out) == whole
    shutil.copytree(world / "images" / "test" / "class0", tmp_path / "moved" / "class0")
    cache_teacher(config, tmp_path / "moved", out, "append")
    images = Cache(out).index.images
    labels = {key.partition("/")[0]: int(label) for key, label in zip(images.keys, images.labels, strict=True)}
    assert labels == {"class1": 0, "class2": 1, "class0": 2} and len(images) == 30


def test_a_test_folder_without_a_class_is_numbered_as_the_other(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "images" / "test", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / "class0")
    config = world_config(world)
    found = evaluate(config, world / "teacher", str(world / "images" / "train"), str(tmp_path / "test"))
    whole = evaluate(config, world / "teacher", str(world / "train"), str(world / "test"))
    assert found.test_images == 30 and found.linear is not None and whole.linear is not None


def test_a_plan_reads_folders(world: Path) -> None:
    assert plan(world_config(world), world / "images" / "test", seconds=0).images == 40


def test_the_advice_in_mid_work_works(
    world: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a message tells to add to the command is added, as printed, and the command goes on."""
    photos = tmp_path / "photos"
    shutil.copytree(world / "images" / "test" / "class0", photos / "x")
    (photos / "x" / "broken.png").write_bytes(b"no image")
    words = ["cache-teacher", "--images", photos, "--out", tmp_path / "cache", "--config", config_file]
    assert run_singer(monkeypatch, *words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    advice = re.search(r"go on without it: (--resume --on-error skip)", line)
    assert advice and run_singer(monkeypatch, *words, *advice[1].split()) == 0
    assert len(Cache(tmp_path / "cache").index.images) == 10
    tar = write_tar(tmp_path / "t.tar", {"s.a.png": png(), "s.b.png": png(), "t.a.png": png(), "u.x": b""})
    for command in (["cache-teacher", "--out", tmp_path / "c2"], ["cache", "plan", "--seconds", "0"]):
        words = [*command, "--shards", tar, "--config", config_file]
        capfd.readouterr()
        assert run_singer(monkeypatch, *words) == 2
        told = capfd.readouterr().err
        keys = re.findall(r"(?:--set data\.\S+?|--on-error \w+)(?=[;,]|$)", told.strip())
        assert keys == ["--set data.image_key=a.png", "--set data.image_key=.png", "--on-error skip"]
        assert run_singer(monkeypatch, *words, *shlex.split(keys[0]), *shlex.split(keys[2])) == 0


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SINGER_DOWNLOADS", str(tmp_path / "downloads"))
    return tmp_path / "downloads"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of a folder: (its URL, the folder)."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    serve = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=serve.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serve.server_address[1]}", tmp_path / "web"
    serve.shutdown()
    thread.join()
    serve.server_close()


def test_shards_of_a_web_server_are_copied_once(
    web: tuple[str, Path], downloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, folder = web
    for number in range(3):
        write_tar(folder / f"s-{number}.tar", {f"{number}.png": png()})
    images = index_images(f"{url}/s-{{0..1}}.tar")
    assert list(images.keys) == ["0", "1"] and all(downloads in path.parents for path in images.paths)
    assert capfd.readouterr().err.count("copying http://") == 2
    assert resolve(f"{url}/s-1.tar") == [images.paths[1]] and "copying" not in capfd.readouterr().err
    whole = images.paths[1].read_bytes()
    images.paths[1].write_bytes(whole[:100])  # as a power cut may leave it
    assert resolve(f"{url}/s-1.tar") == [images.paths[1]] and images.paths[1].read_bytes() == whole
    capfd.readouterr()
    write_tar(folder / "s-1.tar", {"other.png": png(), "more.png": png()})
    os.utime(folder / "s-1.tar", (2e9, 2e9))  # it may have the size of the first one, and be made in the same second
    assert list(index_images(f"{url}/s-1.tar").keys) == ["other", "more"]
    with pytest.raises(UserError, match=r"s-9\.tar does not exist"):
        resolve(f"{url}/s-9.tar")
    assert not [file for file in downloads.rglob("*") if file.name.endswith("~") or "part" in file.name]


def test_shards_of_an_object_store_are_copied(downloads: Path, tmp_path: Path, s3: None) -> None:
    store = open_store("s3://bucket/data")
    for number in range(2):
        store.write(f"s-{number}.tar", write_tar(tmp_path / "s.tar", {f"{number}.png": png()}).read_bytes())
    store.write("more/s-2.tar", b"")
    images = index_images("s3://bucket/data/s-*.tar")
    assert list(images.keys) == ["0", "1"] and np.all(images.size > 0)
    with pytest.raises(UserError, match=r"nothing matches 's3://bucket/data/x\*\.tar'"):
        resolve("s3://bucket/data/x*.tar")
    with pytest.raises(UserError, match="s-7.tar does not exist"):
        resolve("s3://bucket/data/s-7.tar")
