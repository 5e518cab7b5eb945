"""ImageNet in its variants: folders with a sub-folder for each class."""

from pathlib import Path

from pipeline.data.entries import Entry, Listing
from pipeline.data.importers.listing import images_in, read_lines, read_mat
from pipeline.data.sources.class_folders import list_folder
from singer.errors import UserError

_DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def _class_folders(root: Path) -> Listing:
    """List a folder of class folders. Raises UserError if it is missing, or has no classes."""
    if not root.is_dir():
        raise UserError(f"{root} does not exist; this layout needs it")
    listing = list_folder(root)
    if not listing.classes:
        raise UserError(f"{root} holds no class folders; this layout needs them there")
    return listing


def imagenet_1k(root: Path, split: str) -> Listing:
    """List train/<wnid>/*.JPEG, or val/, likewise or flat as it is distributed, with the devkit unpacked in the root.

    The devkit numbers classes in its own order; labels are the usual ones, by sorted wnid.
    """
    here = root / split
    if split == "train" or (here.is_dir() and any(f.is_dir() for f in here.iterdir())):
        return _class_folders(here)
    (files, left_out), truth = images_in(here), read_lines(root / _DEVKIT / _TRUTH)
    if len(files) != len(truth):
        raise UserError(f"{root / _DEVKIT / _TRUTH} has {len(truth)} lines for {len(files)} images in {here}")
    synsets = read_mat(root / _DEVKIT / "meta.mat", "synsets")
    leaves = [s for s in synsets if int(s["num_children"]) == 0]
    classes = sorted(str(s["WNID"]) for s in leaves)
    numbers = {str(int(s["ILSVRC2012_ID"])): classes.index(str(s["WNID"])) for s in leaves}
    unknown = [line for line in truth if line not in numbers]
    if unknown:
        raise UserError(f"{root / _DEVKIT / _TRUTH} has {unknown[0]!r}, which is not a class of meta.mat beside it")
    entries = [Entry(str(file), numbers[line]) for file, line in zip(files, truth, strict=True)]
    return Listing(entries, classes, left_out=left_out)


def imagenet_r(root: Path, split: str) -> Listing:
    """List <wnid>/*.jpg of 200 of the 1000 classes, numbered from 0 to 199 unless prepare.classes is given."""
    return _class_folders(root)


def imagenet_v2(root: Path, split: str) -> Listing:
    """List 0/ to 999/, named after the labels of ImageNet-1k; sorted as text they would get other numbers."""
    listing = _class_folders(root)
    wrong = [name for name in listing.classes if not name.isdecimal()]
    if wrong:
        raise UserError(f"{root / wrong[0]} is not a class number; the folders of this layout are 0 to 999")
    numbers = [int(name) for name in listing.classes]
    entries = [Entry(e.file, numbers[e.label], e.beside) for e in listing.entries if e.label is not None]
    return Listing(entries, [], left_out=listing.left_out)
