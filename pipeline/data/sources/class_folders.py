"""List the images of a folder: its sub-folders are classes, and masks and depth maps are beside the images."""

from collections.abc import Collection
from pathlib import Path

from pipeline.data.entries import Entry, Listing
from pipeline.data.formats import KEPT, START_BYTES, format_of
from pipeline.data.walk import as_text, printable, stem_of, walk
from singer.errors import UserError

BESIDE = ("seg.png", "depth.png")
_MAPS = tuple(f".{name}" for name in BESIDE)


def list_folder(root: Path) -> Listing:
    """List the image files below a folder, sorted; its sub-folders are classes, if every image is in one.

    A mask or a depth map is beside its image as NAME.seg.png or NAME.depth.png. Links are followed; hidden files and
    folders are left out. Raises UserError for a map without an image, or a mixture of class folders and loose images.
    """
    found = walk(root, KEPT, unnamed=_is_image)
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


def check_filled(listing: Listing, or_else: str = "") -> None:
    """Raise UserError for a class folder without images: to leave it out would shift the numbers of those after it.

    or_else: what the user can do besides removing it.
    """
    if listing.class_root is None:
        return
    filled = {entry.label for entry in listing.entries}
    empty = [name for number, name in enumerate(listing.classes) if number not in filled]
    if empty:
        raise UserError(f"class folder {printable(listing.class_root / empty[0])} holds no images; remove it{or_else}")


def _is_image(path: str) -> bool:
    """Return whether a file begins as an image does."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (many files: a Path takes longer)
            return format_of(file.read(START_BYTES)) is not None
    except OSError:
        return False
