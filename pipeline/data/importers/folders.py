"""Data sets with a sub-folder for each class: any folder of images, and ImageNet in its variants."""

from pathlib import Path

from pipeline.data.importers.listing import KEPT, Entry, Listing, images_in, read_lines, read_mat
from singer.errors import UserError

BESIDE = ("seg.png", "depth.png")
_DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def folder(root: Path, split: str = "") -> Listing:
    """List the image files below a folder, sorted; its sub-folders are classes, if every image is in one.

    A mask or a depth map is beside its image as NAME.seg.png or NAME.depth.png. Hidden files and folders are left out.
    Raises UserError for a map without an image, a mixture of class folders and loose images, or an empty class.
    """
    found = sorted(f for f in root.rglob("*") if f.suffix.lower() in KEPT and f.is_file())
    found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    maps = {f for f in found if f.name.lower().endswith(tuple(f".{name}" for name in BESIDE))}
    files = [f for f in found if f not in maps]
    if not files:
        raise UserError(f"no images ({', '.join(KEPT)}) below {root}")
    stems = {f.with_suffix("") for f in files}
    for file in sorted(maps):
        if file.with_suffix("").with_suffix("") not in stems:
            raise UserError(f"{file} has no image beside it")
    loose = [f for f in files if f.parent == root]
    if loose and len(loose) < len(files):
        raise UserError(f"{root} mixes class folders and loose images such as {loose[0].name}; move one of the two")
    if loose:
        return Listing([Entry(file, None, _beside(file)) for file in files], [])
    classes = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    numbers = {name: number for number, name in enumerate(classes)}
    entries = [Entry(file, numbers[file.relative_to(root).parts[0]], _beside(file)) for file in files]
    empty = set(range(len(classes))) - {entry.label for entry in entries}
    if empty:
        # Leaving it out would shift the numbers of all classes after it.
        name = classes[min(empty)]
        raise UserError(f"class folder {root / name} holds no images; remove it, or give prepare.classes")
    return Listing(entries, classes)


def _beside(file: Path) -> dict[str, Path]:
    """Return {extension: file} of the maps beside an image."""
    places = {name: file.with_name(f"{file.stem}.{name}") for name in BESIDE}
    return {name: place for name, place in places.items() if place.is_file()}


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
    files, truth = images_in(here), read_lines(root / _DEVKIT / _TRUTH)
    if len(files) != len(truth):
        raise UserError(f"{root / _DEVKIT / _TRUTH} has {len(truth)} lines for {len(files)} images in {here}")
    synsets = read_mat(root / _DEVKIT / "meta.mat", "synsets")
    leaves = [s for s in synsets if int(s["num_children"]) == 0]
    classes = sorted(str(s["WNID"]) for s in leaves)
    numbers = {str(int(s["ILSVRC2012_ID"])): classes.index(str(s["WNID"])) for s in leaves}
    unknown = [line for line in truth if line not in numbers]
    if unknown:
        raise UserError(f"{root / _DEVKIT / _TRUTH} has {unknown[0]!r}, which is no class of meta.mat beside it")
    return Listing([Entry(f, numbers[line]) for f, line in zip(files, truth, strict=True)], classes)


def imagenet_r(root: Path, split: str) -> Listing:
    """List <wnid>/*.jpg of 200 of the 1000 classes, numbered from 0 to 199 unless prepare.classes is given."""
    return _class_folders(root)


def imagenet_v2(root: Path, split: str) -> Listing:
    """List 0/ to 999/, named after the labels of ImageNet-1k; sorted as text they would get other numbers."""
    listing = _class_folders(root)
    wrong = [name for name in listing.classes if not name.isdecimal()]
    if wrong:
        raise UserError(f"{root / wrong[0]} is no class number; the folders of this layout are 0 to 999")
    numbers = [int(name) for name in listing.classes]
    entries = [Entry(e.file, numbers[e.label], e.beside) for e in listing.entries if e.label is not None]
    return Listing(entries, [])
