"""Shards: expansion, index, images, and what prepare writes."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import config_with, draw_images, tree_bytes
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.prepare import prepare
from pipeline.shards import NO_LABEL, ImageFile, expand_shards, index_shards, to_rgb


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_with_webdataset(paths: Iterable[Path]) -> list[dict[str, bytes]]:
    """Samples as the webdataset library groups them (its own file opener leaves files open)."""
    samples = []
    for path in paths:
        with path.open("rb") as stream:
            samples += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return samples


def test_expand(tmp_path: Path) -> None:
    for i in range(12):
        write_tar(tmp_path / f"t-{i:04d}.tar", {})
    names = [p.name for p in expand_shards(str(tmp_path / "t-{0002..0004}.tar"))]
    assert names == ["t-0002.tar", "t-0003.tar", "t-0004.tar"]
    assert len(expand_shards(str(tmp_path / "*.tar"))) == 12
    assert len(expand_shards([str(tmp_path / "t-0000.tar"), str(tmp_path / "t-001*.tar")])) == 3
    with pytest.raises(ValueError, match="no shard matches"):
        expand_shards(str(tmp_path / "x-*.tar"))
    with pytest.raises(ValueError, match=r"t-0012.tar does not exist \(nor 1 more\)"):
        expand_shards(str(tmp_path / "t-{0010..0013}.tar"))
    with pytest.raises(ValueError, match="given twice"):
        expand_shards([str(tmp_path / "t-0000.tar")] * 2)


def test_index_agrees_with_webdataset(world: Path) -> None:
    images = index_shards(str(world / "train" / "*.tar"))
    samples = read_with_webdataset(images.paths)
    assert [s["__key__"] for s in samples] == list(images.keys)
    assert [int(s["cls"]) for s in samples] == images.labels.tolist()
    with ImageFile(images) as files:
        for number, sample in enumerate(samples):
            expected = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
            np.testing.assert_array_equal(np.asarray(files.read(number)), expected)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(), "a.cls": b"x"}, "label of 'a' is no class number"),
        ({"a.png": png(), "a.cls": b"-3"}, "label of 'a' is no class number"),
        ({"a.cls": b"3"}, "sample 'a' has no jpg"),
        ({"a.png": png(), "b.png": png(), "a.jpg": png()}, "key 'a' occurs twice"),
        ({}, "no images in 1 shards"),
        ({"a.pyd": b"cos\nsystem\n"}, "sample 'a' has no jpg"),
    ],
)
def test_bad_shards_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(ValueError, match="bad.tar") as error:
        index_shards(str(path))
    assert message in str(error.value)


def test_truncated_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cut.tar", {"a.png": png((64, 64)), "b.png": png((99, 99))})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        images = index_shards(str(path))
        ImageFile(images).read(len(images) - 1)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    whole = png((64, 64))
    images = index_shards(
        str(write_tar(tmp_path / "t.tar", {"zero.png": b"", "text.jpg": b"hello", "cut.png": whole[:-40]}))
    )
    assert images.labels.tolist() == [NO_LABEL] * 3
    with ImageFile(images) as files:
        for number, key in enumerate(["zero", "text", "cut"]):
            with pytest.raises(ValueError, match=f"image '{key}' in .*t.tar cannot be decoded"):
                files.read(number)


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = index_shards(str(write_tar(tmp_path / "t.tar", {"a.png": png((20, 20))})))
    monkeypatch.setattr("pipeline.shards.MAX_PIXELS", 399)
    with ImageFile(images) as files, pytest.raises(ValueError, match="20 x 20 pixels are too many"):
        files.read(0)


def test_every_mode_becomes_rgb() -> None:
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
    sixteen = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert np.asarray(to_rgb(sixteen)).tolist() == np.full((2, 2, 3), 128).tolist()
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_prepare_image_folder(tmp_path: Path) -> None:
    draw_images(tmp_path / "in", 3, 4)
    (tmp_path / "in" / "class0" / "a.b.jpg").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class0" / "a.b.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "class1" / "bitmap.bmp")
    Image.new("L", (5, 5)).save(tmp_path / "in" / "class1" / "0.seg.png")
    result = prepare(config_with("prepare.shard_images=5"), tmp_path / "in", tmp_path / "out")
    assert (result.images, result.classes, len(result.shards)) == (14, ["class0", "class1", "class2"], 3)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == result.classes
    images = index_shards(str(tmp_path / "out" / "*.tar"))
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
    with pytest.raises(ValueError, match=r"bad\.png cannot be decoded.*on_error=skip"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    result = prepare(config_with("prepare.on_error=skip"), tmp_path / "in", tmp_path / "out", "overwrite")
    assert (result.images, result.classes, [p.name for p in result.skipped]) == (1, [], ["bad.png"])


def test_prepare_numbers_classes_alike(tmp_path: Path) -> None:
    draw_images(tmp_path / "train", 3, 2)
    prepare(config_with(), tmp_path / "train", tmp_path / "out" / "train")
    draw_images(tmp_path / "val", 3, 2)
    for file in (tmp_path / "val" / "class1").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="class folder .*class1 holds no images"):
        prepare(config_with(), tmp_path / "val", tmp_path / "out" / "val")
    (tmp_path / "val" / "class1").rmdir()
    (tmp_path / "val" / ".cache").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / ".cache" / "x.png")
    config = config_with(f"prepare.classes={tmp_path / 'out' / 'train' / 'classes.json'}")
    result = prepare(config, tmp_path / "val", tmp_path / "out" / "val")
    assert result.classes == ["class0", "class1", "class2"] and result.images == 4
    assert sorted(index_shards(str(tmp_path / "out" / "val" / "*.tar")).labels) == [0, 0, 2, 2]
    (tmp_path / "val" / "class9").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "val" / "class9" / "x.png")
    with pytest.raises(ValueError, match="has no class 'class9'"):
        prepare(config, tmp_path / "val", tmp_path / "out" / "val2")


def test_prepare_drops_nothing_silently(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("mountain_depth", "boxseg"):
        Image.new("RGB", (5, 5)).save(tmp_path / "in" / f"{name}.png")
    assert prepare(config_with(), tmp_path / "in", tmp_path / "out").images == 2
    Image.new("L", (5, 5)).save(tmp_path / "in" / "lost.seg.png")
    with pytest.raises(ValueError, match=r"lost\.seg\.png has no image beside it"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out2")


def test_prepare_opens_no_other_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded: cannot identify image file"):
        prepare(config_with(), tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_prepare_refusals(tmp_path: Path) -> None:
    (tmp_path / "in" / "c").mkdir(parents=True)
    config = config_with()
    with pytest.raises(ValueError, match="no images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "loose.jpg")
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "c" / "a.jpg")
    with pytest.raises(ValueError, match="mixes class folders and loose images"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "loose.jpg").unlink()
    Image.new("RGB", (5, 5)).save(tmp_path / "in" / "c" / "a.png")
    with pytest.raises(ValueError, match="would have the same key 'c/a'"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="is or touches the input"):
        prepare(config, tmp_path / "in", tmp_path / "in" / "out")
    assert not (tmp_path / "out").exists()
