"""Layouts of known data sets: a miniature of each becomes the shards that it should, and what is missing is named."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import config_with
from PIL import Image
from scipy.io import savemat

from pipeline.data.importers import LAYOUTS
from pipeline.stages.prepare import prepare
from singer.errors import UserError


def draw(file: Path, pixels: np.ndarray | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8) if pixels is None else pixels).save(file)


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def imagenet_folders(root: Path) -> None:
    for split, count in (("train", 2), ("val", 1)):
        for wnid in ("n02", "n01"):
            for number in range(count):
                draw(root / split / wnid / f"{wnid}_{number}.JPEG")


def imagenet_flat(root: Path) -> None:
    """The devkit's numbers 1, 2, 3 are n03, n01, n02; 4 is not a leaf."""
    imagenet_folders(root)
    for folder in ("n01", "n02"):
        (root / "val" / folder / f"{folder}_0.JPEG").unlink()
        (root / "val" / folder).rmdir()
    for number in (1, 2, 3, 4):
        draw(root / "val" / f"ILSVRC2012_val_0000000{number}.JPEG")
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    write(devkit / "ILSVRC2012_validation_ground_truth.txt", "3", "1", "2", "1")
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(1, "n03", "c", 0), (2, "n01", "a", 0), (3, "n02", "b", 0), (4, "n00", "all", 3)]
    savemat(devkit / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})


def imagenet_r(root: Path) -> None:
    write(root / "README.txt", "not an image")
    for wnid in ("n07", "n05"):
        draw(root / wnid / "art_0.jpg")


def imagenet_v2(root: Path) -> None:
    for number in (0, 2, 10):
        draw(root / str(number) / "x.jpeg")


def ade20k(root: Path) -> None:
    for split in ("training", "validation"):
        draw(root / "images" / split / "ADE_1.jpg")
        draw(root / "annotations" / split / "ADE_1.png", np.array([[0, 1, 150]], np.uint8).repeat(4, 0).repeat(2, 1))


def nyud_v2(root: Path) -> None:
    for split in ("train", "test"):
        draw(root / split / "bath_1" / "rgb_00045.jpg")
        draw(root / split / "bath_1" / "sync_depth_00045.png", np.full((4, 6), 2500, np.uint16))


def inat2019(root: Path) -> None:
    """Categories in any order, annotations in another than images."""
    for number in (1, 2, 3):
        draw(root / "train_val2019" / "Birds" / "7" / f"{number}.jpg")
    files = [f"train_val2019/Birds/7/{number}.jpg" for number in (1, 2, 3)]
    tree = {
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(files)],
        "annotations": [{"id": i, "image_id": 12 - i, "category_id": c} for i, c in enumerate((5, 2, 2))],
        "categories": [{"id": 5, "name": "five"}, {"id": 2, "name": "two"}],
    }
    write(root / "val2019.json", json.dumps(tree))


def fgvc_aircraft(root: Path) -> None:
    for number in (101, 102):
        draw(root / "images" / f"{number}.jpg")
    write(root / "variants.txt", "707-320", "F/A-18", "Yak 42")
    write(root / "images_variant_trainval.txt", "101 Yak 42", "102 F/A-18")


def oxford_pets(root: Path) -> None:
    for name in ("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3"):
        draw(root / "images" / f"{name}.jpg")
    write(root / "annotations" / "test.txt", "# name", "great_pyrenees_2 2 2 1", "Abyssinian_1 1 1 1")


def food_101(root: Path) -> None:
    for name in ("waffles/1", "apple_pie/2", "apple_pie/3"):
        draw(root / "images" / f"{name}.jpg")
    write(root / "meta" / "classes.txt", "apple_pie", "waffles")
    write(root / "meta" / "test.txt", "waffles/1", "apple_pie/2")


def flowers_102(root: Path) -> None:
    for number in range(1, 5):
        draw(root / "jpg" / f"image_0000{number}.jpg")
    savemat(root / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 3]], np.uint8)})
    numbers = {"trnid": [[4]], "valid": [[2]], "tstid": [[3, 1]]}
    savemat(root / "setid.mat", {name: np.array(rows, np.uint16) for name, rows in numbers.items()})


# name: layout, split, its maker, {key: label}, classes, files without which it cannot be
Case = tuple[str, str | None, Callable[[Path], None], dict[str, int | None], list[str], list[str]]
CASES: list[Case] = [
    ("imagenet-1k", "train", imagenet_folders, {f"train/n0{c + 1}/n0{c + 1}_{i}": c for c in (0, 1) for i in (0, 1)},
     ["n01", "n02"], []),
    ("imagenet-1k", "val", imagenet_folders, {"val/n01/n01_0": 0, "val/n02/n02_0": 1}, ["n01", "n02"], []),
    ("imagenet-1k", "val", imagenet_flat, {f"val/ILSVRC2012_val_0000000{i + 1}": c for i, c in enumerate((1, 2, 0, 2))},
     ["n01", "n02", "n03"], ["ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
                             "ILSVRC2012_devkit_t12/data/meta.mat"]),
    ("imagenet-r", None, imagenet_r, {"n05/art_0": 0, "n07/art_0": 1}, ["n05", "n07"], []),
    ("imagenet-v2", None, imagenet_v2, {"0/x": 0, "2/x": 2, "10/x": 10}, [], []),
    ("ade20k", "val", ade20k, {"images/validation/ADE_1": None}, [], ["annotations/validation/ADE_1.png"]),
    ("nyud-v2", "test", nyud_v2, {"test/bath_1/rgb_00045": None}, [], ["test/bath_1/sync_depth_00045.png"]),
    ("inat2019", "val", inat2019, {f"train_val2019/Birds/7/{i}": c for i, c in ((1, 0), (2, 0), (3, 1))},
     ["two", "five"], ["val2019.json", "train_val2019/Birds/7/2.jpg"]),
    ("fgvc-aircraft", "trainval", fgvc_aircraft, {"images/101": 2, "images/102": 1}, ["707-320", "F/A-18", "Yak 42"],
     ["variants.txt", "images_variant_trainval.txt", "images/102.jpg"]),
    ("oxford-pets", "test", oxford_pets, {"images/great_pyrenees_2": 1, "images/Abyssinian_1": 0},
     ["Abyssinian", "great_pyrenees"], ["annotations/test.txt", "images/Abyssinian_1.jpg"]),
    ("food-101", "test", food_101, {"images/waffles/1": 1, "images/apple_pie/2": 0}, ["apple_pie", "waffles"],
     ["meta/classes.txt", "meta/test.txt", "images/waffles/1.jpg"]),
    ("flowers-102", "test", flowers_102, {"jpg/image_00003": 101, "jpg/image_00001": 76}, [],
     ["setid.mat", "imagelabels.mat", "jpg/image_00003.jpg"]),
]  # fmt: skip


def config_of(layout: str, split: str | None, *sets: str) -> list[str]:
    return [f"prepare.layout={layout}", *([f"prepare.split={split}"] if split else []), *sets]


def samples(shards: list[Path]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def test_every_layout_is_here() -> None:
    assert {case[0] for case in CASES} == set(LAYOUTS) - {"folder"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2].__name__}")
def test_miniatures(case: Case, tmp_path: Path) -> None:
    layout, split, make, labels, classes, needed = case
    make(tmp_path / "in")
    config = config_with(*config_of(layout, split))
    result = prepare(config, tmp_path / "in", tmp_path / "out")
    found = samples(result.shards)
    assert {key: int(s["cls"]) if "cls" in s else None for key, s in found.items()} == labels
    assert result.classes == classes and result.images == len(labels)
    assert (tmp_path / "out" / "classes.json").is_file() == bool(classes)
    for name in needed:
        kept = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).unlink()
        with pytest.raises(UserError, match=rf"{tmp_path / 'in' / name} does not exist; "):
            prepare(config, tmp_path / "in", tmp_path / "out2")
        (tmp_path / "in" / name).write_bytes(kept)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path / 'none'}"):
        prepare(config, tmp_path / "none", tmp_path / "out2")


def test_masks_lose_their_void_and_depth_is_kept(tmp_path: Path) -> None:
    ade20k(tmp_path / "ade")
    result = prepare(config_with(*config_of("ade20k", "train")), tmp_path / "ade", tmp_path / "a")
    (sample,) = samples(result.shards).values()
    assert np.asarray(Image.open(io.BytesIO(sample["seg.png"])))[0].tolist() == [255, 255, 0, 0, 149, 149]
    draw(tmp_path / "ade" / "annotations" / "training" / "ADE_1.png")
    with pytest.raises(UserError, match=r"ADE_1\.png holds no class numbers of 8 bits"):
        prepare(config_with(*config_of("ade20k", "train")), tmp_path / "ade", tmp_path / "b")
    nyud_v2(tmp_path / "nyu")
    result = prepare(config_with(*config_of("nyud-v2", "train")), tmp_path / "nyu", tmp_path / "n")
    (sample,) = samples(result.shards).values()
    assert sample["depth.png"] == (tmp_path / "nyu/train/bath_1/sync_depth_00045.png").read_bytes()


def test_classes_of_another_split(tmp_path: Path) -> None:
    """ImageNet-R is numbered as ImageNet, and -v2 has its names; labels beyond them are refused."""
    write(tmp_path / "classes.json", json.dumps(["n04", "n05", "n06", "n07"]))
    known = f"prepare.classes={tmp_path / 'classes.json'}"
    imagenet_r(tmp_path / "r")
    result = prepare(config_with(*config_of("imagenet-r", None, known)), tmp_path / "r", tmp_path / "a")
    assert {key: int(s["cls"]) for key, s in samples(result.shards).items()} == {"n05/art_0": 1, "n07/art_0": 3}
    imagenet_v2(tmp_path / "v2")
    with pytest.raises(UserError, match=r"classes\.json has 4 classes, but an image has label 10"):
        prepare(config_with(*config_of("imagenet-v2", None, known)), tmp_path / "v2", tmp_path / "b")
    draw(tmp_path / "flat" / "x.jpg")
    with pytest.raises(UserError, match="these images have no classes; leave it out"):
        prepare(config_with(known), tmp_path / "flat", tmp_path / "c")


def replaced(make: Callable[[Path], None], name: str, *lines: str) -> Callable[[Path], None]:
    def changed(root: Path) -> None:
        make(root)
        write(root / name, *lines)

    return changed


DEVKIT = "ILSVRC2012_devkit_t12/data"
BAD: list[tuple[str, str | None, Callable[[Path], None], str]] = [
    ("nothing", None, imagenet_r, r"--layout: unknown 'nothing'; known: folder, imagenet-1k"),
    ("folder", "train", imagenet_r, r"--split train: the layout folder has no splits; leave it out"),
    ("food-101", None, food_101, r"--split: the layout food-101 has train, test; give one of them, not none"),
    ("food-101", "val", food_101, r"has train, test; give one of them, not val"),
    ("food-101", "test", replaced(food_101, "meta/test.txt", "pie/2"), r"test\.txt names the class 'pie'"),
    ("food-101", "test", replaced(food_101, "meta/test.txt"), r"test\.txt is empty"),
    ("oxford-pets", "test", replaced(oxford_pets, "annotations/test.txt", "Abyssinian_1 x 1 1"), r"has a line 'Abys"),
    ("oxford-pets", "test", replaced(oxford_pets, "annotations/test.txt", "Abyssinian_1 2 1 1"), r"not all from 1 on"),
    ("inat2019", "val", replaced(inat2019, "val2019.json", "{}"), r"val2019\.json holds no images, annotations and"),
    ("inat2019", "val", replaced(inat2019, "val2019.json", "{"), r"val2019\.json holds no images, annotations and"),
    ("flowers-102", "val", replaced(flowers_102, "setid.mat", "?"), r"setid\.mat cannot be read as a MATLAB file"),
    ("imagenet-v2", None, imagenet_r, r"n05 is not a class number; the folders of this layout are 0 to 999"),
    ("imagenet-1k", "val", replaced(imagenet_flat, f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt", "1"),
     r"ground_truth\.txt has 1 lines for 4 images in .*val"),
    ("imagenet-1k", "val", replaced(imagenet_flat, f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt", *"1234"),
     r"ground_truth\.txt has '4', which is not a class of meta\.mat"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}-{case[1]}-{case[3][:24]}")
def test_what_is_wrong_is_named(case: tuple[str, str | None, Callable[[Path], None], str], tmp_path: Path) -> None:
    layout, split, make, message = case
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        prepare(config_with(*config_of(layout, split)), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_variables_that_are_missing_or_too_few(tmp_path: Path) -> None:
    flowers_102(tmp_path / "in")
    config = config_with(*config_of("flowers-102", "train"))
    savemat(tmp_path / "in" / "imagelabels.mat", {"labels": np.array([[1, 2, 3]], np.uint8)})
    with pytest.raises(UserError, match=r"setid\.mat has image 4, but .*imagelabels\.mat 3 labels"):
        prepare(config, tmp_path / "in", tmp_path / "out")
    savemat(tmp_path / "in" / "setid.mat", {"other": 1})
    with pytest.raises(UserError, match=r"setid\.mat has no variable 'trnid'"):
        prepare(config, tmp_path / "in", tmp_path / "out")


def test_without_scipy_a_matlab_file_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowers_102(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"setid\.mat cannot be read as a MATLAB file: .*scipy"):
        LAYOUTS["flowers-102"].entries(tmp_path, "val")
