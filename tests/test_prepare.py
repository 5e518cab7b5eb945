"""What prepare writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from conftest import config_with, draw_images, tree_bytes
from PIL import Image
from tars import png, read_with_webdataset

from pipeline.data import index_images
from pipeline.stages.prepare import prepare
from singer.errors import UserError


def test_prepare_image_folder(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", 3, 4)
    (tmp_path / "in" / "class0" / "a.b.jpg").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class0" / "a.b.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class1" / "bitmap.bmp")
    Image.new("L", (5, 5)).save(tmp_path / "in" / "class1" / "0.seg.png")
    result = prepare(config_with("prepare.shard_images=5"), tmp_path / "in", tmp_path / "out")
    assert (result.images, result.classes, len(result.shards)) == (14, ["class0", "class1", "class2"], 3)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == result.classes
    images = index_images(str(tmp_path / "out" / "*.tar"))
    labels = dict(zip(images.keys, images.labels.tolist(), strict=True))
    assert labels["class0/a_b"] == 0 and labels["class2/3"] == 2 and labels["class1/bitmap"] == 1
    masks = [s for s in read_with_webdataset(result.shards) if "seg.png" in s]
    assert [s["__key__"] for s in masks] == ["class1/0"]
    again = prepare(config_with("prepare.shard_images=5"), tmp_path / "in", tmp_path / "again" / "out")
    assert tree_bytes(result.out, "provenance.json") == tree_bytes(again.out, "provenance.json")


def test_prepare_flat_and_skipping(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "good.jpg")
    (tmp_path / "in" / "bad.png").write_bytes(png()[:30])
    with pytest.raises(UserError, match=r"bad\.png cannot be decoded.*--on-error skip"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    result = prepare(config_with("data.on_error=skip"), tmp_path / "in", tmp_path / "out")
    assert (result.images, result.classes, [p.name for p in result.skipped]) == (1, [], ["bad.png"])


def test_prepare_numbers_classes_alike(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 3, 2)
    prepare(config_with(), tmp_path / "train", tmp_path / "out" / "train")
    draw_images(tmp_path / "val", 3, 2)
    for file in (tmp_path / "val" / "class1").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="class folder .*class1 holds no images"):
        prepare(config_with(), tmp_path / "val", tmp_path / "out" / "val")
    (tmp_path / "val" / "class1").rmdir()
    (tmp_path / "val" / ".cache").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / ".cache" / "x.png")
    config = config_with(f"prepare.classes={tmp_path / 'out' / 'train' / 'classes.json'}")
    result = prepare(config, tmp_path / "val", tmp_path / "out" / "val")
    assert result.classes == ["class0", "class1", "class2"] and result.images == 4
    assert sorted(index_images(str(tmp_path / "out" / "val" / "*.tar")).labels) == [0, 0, 2, 2]
    (tmp_path / "val" / "class9").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / "class9" / "x.png")
    with pytest.raises(UserError, match="has no class 'class9'"):
        prepare(config, tmp_path / "val", tmp_path / "out" / "val2")


def test_prepare_drops_nothing_silently(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("mountain_depth", "boxseg"):
        Image.new("RGB", (5, 5)).save(tmp_path / "in" / f"{name}.png")
    assert prepare(config_with(), tmp_path / "in", tmp_path / "out").images == 2
    Image.new("L", (5, 5)).save(tmp_path / "in" / "lost.seg.png")
    with pytest.raises(UserError, match=r"lost\.seg\.png has no image beside it"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out2")


def test_prepare_opens_no_other_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: cannot identify image file"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_prepare_refusals(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    config = config_with()
    with pytest.raises(UserError, match="no images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "loose.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "c" / "a.jpg")
    with pytest.raises(UserError, match="mixes class folders and loose images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "loose.jpg").unlink()
    with pytest.raises(UserError, match="overlaps the input"):
        prepare(config, tmp_path / "in", tmp_path / "in" / "out")
    assert not (tmp_path / "out").exists()
