"""The disk on which a folder is or will be."""

import os
import shutil
from pathlib import Path


def existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def is_writable(folder: Path) -> bool:
    """Return whether this user may write to a folder or, if there is none yet, make it."""
    return os.access(existing(folder), os.W_OK | os.X_OK)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free
