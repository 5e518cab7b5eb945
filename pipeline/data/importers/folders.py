"""Data sets with a sub-folder for each class: any folder of images, and ImageNet in its variants."""

from collections.abc import Collection
from pathlib import Path

from pipeline.data.importers.listing import KEPT, Entry, Listing, images_in, is_image, read_lines, read_mat
from pipeline.data.importers.walk import as_text, printable, stem_of, walk
from singer.errors import UserError

BESIDE = ("seg.png", "depth.png")
_MAPS = tuple(f".{name}" for name in BESIDE)
_DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def folder(root: Path, split: str = "") -> Listing:
    """List the image files below a folder, sorted; its sub-folders are classes, if every image is in one.

    A mask or a depth map is beside its image as NAME.seg.png or NAME.depth.png. Links are followed; hidden files and
    folders are left out. Raises UserError for a map without an image, or a mixture of class folders and loose images.
    """
    found = walk(root, KEPT, unnamed=is_image)
    maps = {name for name in found.files if name.lower().endswith(_MAPS)}
    files = [name for name in found.files if name not in maps]
    if not files:
        lists = "; if these are images, name them in a list (.txt): it takes files with any suffix"
        also = f"; there are only {as_text(found.left_out)}{lists}" if found.left_out else ""
        raise UserError(f"no images ({', '.join(KEPT)}) below {root}{also}")
    stems = set(map(stem_of, files))
    for name in sorted(maps):
        if name.rsplit(".", 2)[0] not in stems:
            raise UserError(f"{printable(root / name)} has no image beside it")
    loose = [name for name in files if "/" not in name]
    if loose and len(loose) < len(files):
        raise UserError(
            f"{root} mixes class folders and loose images such as {printable(loose[0])}; move one of the two"
        )
    numbers = {} if loose else {name: number for number, name in enumerate(found.folders)}
    entries = [
        Entry(f"{root}/{name}", numbers.get(name.partition("/")[0]), _beside(root, name, maps) if maps else None)
        for name in files
    ]
    return Listing(entries, list(numbers), left_out=found.left_out, class_root=root)


def _beside(root: Path, file: str, maps: Collection[str]) -> dict[str, str]:
    """Return {extension: file} of the maps beside an image."""
    places = {name: f"{stem_of(file)}.{name}" for name in BESIDE}
    return {name: f"{root}/{place}" for name, place in places.items() if place in maps}


def beside(file: str) -> dict[str, str]:
    """Return {extension: file} of the maps that are beside an image."""
    places = {name: f"{stem_of(file)}.{name}" for name in BESIDE}
    return {name: place for name, place in places.items() if Path(place).is_file()}


def check_filled(listing: Listing) -> None:
    """Raise UserError for a class folder without images: to leave it out would shift the numbers of those after it."""
    if listing.class_root is None:
        return
    filled = {entry.label for entry in listing.entries}
    empty = [name for number, name in enumerate(listing.classes) if number not in filled]
    if empty:
        raise UserError(
            f"class folder {printable(listing.class_root / empty[0])} holds no images; remove it, or give the classes "
            "of another split with --set prepare.classes=FILE"
        )


def _class_folders(root: Path) -> Listing:
    """List a folder of class folders. Raises UserError if it is missing, or has no classes."""
    if not root.is_dir():
        raise UserError(f"{root} does not exist; this layout needs it")
    listing = folder(root)
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
