"""Layouts of data sets on disk, for `singer prepare --layout`. A new one is a function and a line in the registry."""

from pathlib import Path

from pipeline.data.entries import Listing
from pipeline.data.importers import folders, maps, split_files
from pipeline.data.importers.listing import Importer
from pipeline.data.sources.class_folders import list_folder
from singer.errors import UserError, require_known

LAYOUTS: dict[str, Importer] = {
    "folder": Importer(lambda root, split: list_folder(root)),
    "imagenet-1k": Importer(folders.imagenet_1k, ("train", "val")),
    "imagenet-r": Importer(folders.imagenet_r),
    "imagenet-v2": Importer(folders.imagenet_v2),
    "ade20k": Importer(maps.ade20k, ("train", "val")),
    "nyud-v2": Importer(maps.nyud_v2, ("train", "test")),
    "inat2019": Importer(split_files.inat2019, ("train", "val")),
    "fgvc-aircraft": Importer(split_files.fgvc_aircraft, ("train", "val", "trainval", "test")),
    "oxford-pets": Importer(split_files.oxford_pets, ("trainval", "test")),
    "food-101": Importer(split_files.food_101, ("train", "test")),
    "flowers-102": Importer(split_files.flowers_102, ("train", "val", "test")),
}


def list_layout(name: str, root: Path, split: str | None) -> Listing:
    """List the images of a split. Raises UserError for an unknown layout or split, or for wrong files."""
    require_known("--layout", name, LAYOUTS)
    splits = LAYOUTS[name].splits
    if not splits and split is not None:
        raise UserError(f"--split {split}: the layout {name} has no splits; leave it out")
    if splits and split not in splits:
        raise UserError(f"--split: the layout {name} has {', '.join(splits)}; give one of them, not {split or 'none'}")
    return LAYOUTS[name].entries(root, split or "")
