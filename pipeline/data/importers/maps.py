"""Data sets with a mask or a depth map for every image."""

from pathlib import Path

import numpy as np

from pipeline.data.entries import Entry, Listing
from pipeline.data.importers.listing import existing, images_in
from singer.errors import UserError


def ade20k(root: Path, split: str) -> Listing:
    """List images/{training,validation}/*.jpg with masks in annotations/, *.png (ADEChallengeData2016).

    In these masks 0 is void and the 150 classes begin with 1. Shards get classes 0 to 149, and 255 for void.
    """
    folder = {"train": "training", "val": "validation"}[split]
    entries = []
    files, left_out = images_in(root / "images" / folder)
    for file in files:
        mask = root / "annotations" / folder / f"{file.stem}.png"
        beside = {"seg.png": str(existing(mask, f"it is the mask of {file}"))}
        entries.append(Entry(str(file), None, beside))
    return Listing(entries, [], {"seg.png": _without_void}, left_out)


def _without_void(mask: np.ndarray) -> np.ndarray:
    # With uint8, 0 becomes 255.
    return mask - np.uint8(1)


def nyud_v2(root: Path, split: str) -> Listing:
    """List SPLIT/SCENE/rgb_NUMBER.jpg with sync_depth_NUMBER.png beside it, uint16 millimeters.

    The official split is mostly passed on in this form, aligned and filled in (by BTS and projects that build on it).
    """
    scenes = sorted(f for f in (root / split).glob("*") if f.is_dir())
    files = [file for scene in scenes for file in sorted(scene.glob("rgb_*")) if file.suffix in (".jpg", ".png")]
    if not files:
        raise UserError(f"{root / split} holds no SCENE/rgb_*.jpg; this layout needs them there")
    entries = []
    for file in files:
        depth = file.with_name(f"sync_depth_{file.stem.removeprefix('rgb_')}.png")
        beside = {"depth.png": str(existing(depth, f"it is the depth map of {file}"))}
        entries.append(Entry(str(file), None, beside))
    return Listing(entries, [])
