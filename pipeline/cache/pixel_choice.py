"""Whether the views are stored beside their features, where the configuration leaves it open (views.pixels auto)."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.append import Addition
from pipeline.cache.create import new_manifest
from pipeline.cache.manifest import Manifest, TeacherManifest
from pipeline.config import Config, left_open
from pipeline.runtime.progress import say
from pipeline.storage import Place, is_remote
from pipeline.storage.disk import free_bytes

# The share of the free disk that features and views may take together.
_DISK = 0.5


def with_pixels(config: Config, whole: Addition, teacher: TeacherManifest, out: Place | None, freed: int = 0) -> Config:
    """Return the configuration with what a new cache gets in the place of auto: uint8 if the disk has room, else none.

    whole: all that the cache will hold; out: where it will be, None if that is not known; freed: bytes that will be
    overwritten there. An object store does not say how much it takes, so there the views are not stored.
    """
    if config.views.pixels != "auto":
        return config
    if out is None or is_remote(out):
        where = "without --out" if out is None else f"at {out}"
        say(f"views.pixels auto: the views are not stored, because the free space {where} is not known")
        return _set(config, "none")
    free, stored = free_bytes(Path(out)) + freed, _set(config, "uint8")
    need = _bytes(new_manifest(stored, whole, teacher))
    if need <= _DISK * free:
        return stored
    say(
        f"views.pixels auto: the views are not stored, so students decode the images: with them the cache would take "
        f"{need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
    )
    return _set(config, "none")


def as_stored(config: Config, first: Manifest, teacher: TeacherManifest) -> Config:
    """Return the configuration with what a cache that exists has where views.pixels is auto.

    first: of its first segment; teacher: the one that runs, at whose input's size views would be stored otherwise.
    """
    if config.views.pixels != "auto":
        return config
    if first.pixels is None:
        return _set(config, "none")
    stored = {"pixel_size": first.pixels.size, "jpeg_quality": first.pixels.quality}
    if first.pixels.size == teacher.image_size:
        del stored["pixel_size"]
    return _set(config, first.pixels.kind, **{n: v for n, v in stored.items() if v and left_open(config.views, n)})


def _set(config: Config, kind: str, **stored: Any) -> Config:
    return config.changed(views={"pixels": kind, **stored})


def _bytes(manifest: Manifest) -> int:
    """Return the bytes of a segment's arrays, without those of varying length, which are small."""
    forms = [form for form in manifest.arrays().values() if form is not None]
    return manifest.records * sum(math.prod(form.shape) * np.dtype(form.dtype).itemsize for form in forms)
