"""A rehearsal on a few images, so that what the last stages of a chain refuse is said before hours are spent."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from pipeline.config import Config
from pipeline.data import ImageFile, list_images
from pipeline.planning.sample import Sample
from pipeline.runtime.devices import make_accelerator
from pipeline.runtime.ranks import watched
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.refine import refine
from pipeline.training.cached_teachers import open_teachers
from pipeline.training.runs import NewStudent, StudentSpec

REHEARSAL = "rehearsal"
_IMAGES = 16
_NO_COPY = {"local_copy": None, "local_copy_gb": None}


def rehearse(config: Config, shards: Sequence[str], folder: Path, accelerator: Accelerator) -> None:
    """Cache a few images of the shards, refine them, and build the student with all that its training needs.

    All processes call it together. It works in `folder`, which is emptied first and removed at the end. Raises
    UserError as the stages cache-teacher, refine and distill do.
    """
    sets = {
        # The tar holds KEY.jpg, whatever is in a key. For a few images, the teacher is not compiled.
        "cache": {"image_key": ".jpg", "compile": False},
        "refine": {"steps": 1, **_NO_COPY},
        # Shares are of all images.
        "distill": {"holdout": 0.0, "share": 1.0, "trackers": (), **_NO_COPY},
    }
    small = config.model_copy(update={name: getattr(config, name).model_copy(update=own) for name, own in sets.items()})
    tar, cache, refiner = folder / "0.tar", folder / "cache", folder / "refiner"
    try:
        with watched(accelerator, REHEARSAL):
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                _write(config, shards, tar)
        cache_teacher(small, str(tar), cache)
        refine(small, cache, refiner)
        with watched(accelerator, REHEARSAL):  # the cache is there until all have built the student
            sources = open_teachers(small.distill, cache, refiner)
            NewStudent(StudentSpec(small, folder / "run", refiner), sources, make_accelerator(small.distill.precision))
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def _write(config: Config, shards: Sequence[str], tar: Path) -> None:
    """Write images from all over the shards to a tar."""
    listed = list_images(config, shards)
    images = listed.select(np.unique(np.linspace(0, len(listed) - 1, _IMAGES).astype(int)))
    with ImageFile(images) as files:
        Sample(config, images, files, image_size=1).write_tar(tar, range(len(images)))
