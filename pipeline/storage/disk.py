"""The disk on which a folder is or will be."""

import shutil
from pathlib import Path


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free
