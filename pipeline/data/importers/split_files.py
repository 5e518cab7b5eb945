"""Data sets that list their splits and classes in files."""

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.data.entries import Entry, Listing
from pipeline.data.importers.listing import existing, read_lines, read_mat
from singer.errors import UserError


def _listed(pairs: Iterable[tuple[Path, int]], source: Path) -> list[Entry]:
    """Make entries of (file, label). Raises UserError for an image that is not there."""
    return [Entry(str(existing(file, f"{source} lists it")), label) for file, label in pairs]


def _numbered(names: list[str], classes: list[str], source: Path) -> list[int]:
    """Return the number of each name among the classes. Raises UserError for one that is not a class."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise UserError(f"{source} names the class {unknown[0]!r}, which is not among the classes of this data set")
    return [numbers[name] for name in names]


def inat2019(root: Path, split: str) -> Listing:
    """List SPLIT2019.json, in COCO's form, with file names from the root such as train_val2019/Birds/1003/x.jpg."""
    source = existing(root / f"{split}2019.json")
    try:
        tree = json.loads(source.read_text())
        names = {int(c["id"]): str(c["name"]) for c in tree["categories"]}
        files = {int(i["id"]): root / str(i["file_name"]) for i in tree["images"]}
        pairs = [(files[int(a["image_id"])], int(a["category_id"])) for a in tree["annotations"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{source} holds no images, annotations and categories that fit each other") from None
    ids = sorted(names)
    labels = _numbered([str(category) for _, category in pairs], [str(i) for i in ids], source)
    entries = _listed(zip([file for file, _ in pairs], labels, strict=True), source)
    return Listing(entries, [names[i] for i in ids])


def fgvc_aircraft(root: Path, split: str) -> Listing:
    """List images/*.jpg by variants.txt and images_variant_SPLIT.txt with lines `1025794 707-320` (folder data/)."""
    source = root / f"images_variant_{split}.txt"
    rows = [line.partition(" ") for line in read_lines(source)]
    classes = read_lines(root / "variants.txt")
    labels = _numbered([name for _, _, name in rows], classes, source)
    files = [root / "images" / f"{number}.jpg" for number, _, _ in rows]
    return Listing(_listed(zip(files, labels, strict=True), source), classes)


def oxford_pets(root: Path, split: str) -> Listing:
    """List images/*.jpg by annotations/SPLIT.txt with lines `Abyssinian_100 1 1 1`: name, class from 1 on, two more."""
    source = root / "annotations" / f"{split}.txt"
    rows = [line.split() for line in read_lines(source) if not line.startswith("#")]
    bad = [row for row in rows if len(row) != 4 or not row[1].isdecimal() or row[1] == "0"]
    if bad:
        raise UserError(f"{source} has a line {' '.join(bad[0])!r}; expected a name and three numbers")
    names = {int(number): name.rpartition("_")[0] for name, number, *_ in rows}
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{source} has the classes {sorted(names)}, not all from 1 on")
    pairs = [(root / "images" / f"{name}.jpg", int(number) - 1) for name, number, *_ in rows]
    return Listing(_listed(pairs, source), [names[number] for number in sorted(names)])


def food_101(root: Path, split: str) -> Listing:
    """List images/CLASS/NUMBER.jpg by meta/classes.txt, and meta/SPLIT.txt with lines `apple_pie/1005649`."""
    source = root / "meta" / f"{split}.txt"
    names = read_lines(source)
    classes = read_lines(root / "meta" / "classes.txt")
    labels = _numbered([name.partition("/")[0] for name in names], classes, source)
    files = [root / "images" / f"{name}.jpg" for name in names]
    return Listing(_listed(zip(files, labels, strict=True), source), classes)


def flowers_102(root: Path, split: str) -> Listing:
    """List jpg/image_00001.jpg ... by imagelabels.mat (classes from 1 on) and setid.mat (images from 1 on).

    The data set has no names of classes.
    """
    source = root / "setid.mat"
    rows = read_mat(source, {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    labels = read_mat(root / "imagelabels.mat", "labels")
    if rows.min() < 1 or rows.max() > len(labels):
        raise UserError(f"{source} has image {int(rows.max())}, but {root / 'imagelabels.mat'} {len(labels)} labels")
    pairs = [(root / "jpg" / f"image_{row:05d}.jpg", int(labels[row - 1]) - 1) for row in rows.tolist()]
    return Listing(_listed(pairs, source), [])
