"""Reading all images of some shards as the pass that feeds the teacher does, without a teacher."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache.append import Addition
from pipeline.cache.create import new_manifest
from pipeline.cache.manifest import TeacherManifest
from pipeline.cache.view_reader import ViewReader
from pipeline.config import load_config
from pipeline.data import ImageFile, Images, OnError
from pipeline.runtime.prefetch import prefetch


@dataclass(frozen=True)
class Validated:
    """The images that can be decoded, what was found of them, and the names of the others with the reason."""

    images: Images
    found: np.ndarray
    unreadable: dict[str, str]


def validate_images(images: Images, workers: int, on_error: OnError) -> Validated:
    teacher = TeacherManifest(
        name="none", architecture="none", model_args={}, weights="", depth=1, width=1, prefix_tokens=0,
        class_token=False, grid=(1, 1), image_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, precision="no",
        dtype="float32", shapes=None, copies=1,
    )  # fmt: skip
    manifest = new_manifest(load_config(sets=["views.pixels=none"]), Addition((0,), images, 0, 1), teacher)
    with ImageFile(images) as files:
        read = ViewReader(files, manifest, on_error)
        seen = list(prefetch(read, np.array_split(np.arange(len(images)), -(-len(images) // 8)), workers))
    found = np.concatenate([s.found for s in seen])
    broken = {images.keys[n]: reason for s in seen for n, reason in s.unreadable.items()}
    good = np.flatnonzero(found["width"])
    return Validated(images.select(good), found[good], broken)
