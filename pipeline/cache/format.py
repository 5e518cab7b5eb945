"""Name the files of a cache. docs/cache-format.md is normative; where this file differs, this file is wrong."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # codecs need torch
    from pipeline.cache.stored import Fixed

FORMAT = "singer-feature-cache"
VERSION = 4

IMAGES = "images.safetensors"
RECORDS = "records.safetensors"
COMPLETE = "complete.json"
TAIL = "tail.safetensors"
CALIBRATION = "calibration.safetensors"
FIDELITY = "fidelity.json"
SKIPPED = "skipped.json"
JOURNAL = "journal"
FEATURES = "features"
POSITIONS = "positions"
PIXELS = "pixels"
VIEWS = "views"
PARTS = "parts"


def zarr_shard_file(array: str, form: "Fixed | None", shard: int) -> str:
    """Return the file of one Zarr shard of an array, by Zarr's default chunk keys."""
    axes = 1 + (len(form.shape) if form is not None else 0)
    return "/".join([array, "c", str(shard), *["0"] * (axes - 1)])


def journal_file(shard: int) -> str:
    """Return the file of the journal entry of a Zarr shard."""
    return f"{JOURNAL}/{shard:06d}.json"
