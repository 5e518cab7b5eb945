"""A rehearsal on a few images, so that what the last stages of a chain refuse is said before hours are spent."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState

from pipeline.config import Config
from pipeline.data import ImageFile, list_images
from pipeline.data.source_listing import NO_LABEL
from pipeline.planning.sample import Sample
from pipeline.runtime.devices import make_accelerator, own_settings
from pipeline.runtime.watched_rank import watched
from pipeline.stages.cache_teacher import cache_teacher
from pipeline.stages.distill import check_shared, check_spec
from pipeline.stages.refine import refine
from pipeline.training.distilling.cached_teachers import open_teachers
from pipeline.training.distilling.image_scores import check_scores
from pipeline.training.distilling.runs import NewStudent, StudentSpec
from pipeline.training.distilling.subset import image_counts
from pipeline.training.fsdp import check_fsdp
from singer.errors import UserError

REHEARSAL = "rehearsal"
_IMAGES = 16
_NO_COPY = {"local_copy": None, "local_copy_gb": None}


@own_settings()
def rehearse(config: Config, shards: Sequence[str], images: int, folder: Path, process: PartialState) -> None:
    """Cache a few images of the shards, refine them, and build the student with all that its training needs.

    images: how many there are in all. All processes call it together. It works in `folder`, which is emptied first and
    removed at the end. Raises UserError as the stages cache-teacher, refine and distill do.
    """
    try:
        _rehearse(config, shards, images, folder, process)
    except (UserError, OSError):
        _remove(folder, process)
        raise
    _remove(folder, process)  # not after a defect, whose log is there


def _rehearse(config: Config, shards: Sequence[str], images: int, folder: Path, process: PartialState) -> None:
    small = config.changed(
        # The tar holds KEY.jpg, whatever is in a key. For a few images, the teacher is not compiled.
        data={"image_key": ".jpg"},
        cache={"compile": False},
        refine={"steps": 1, **_NO_COPY},
        distill=_NO_COPY,
    )
    settings, tar, cache = small.distill, folder / "0.tar", folder / "cache"
    spec = StudentSpec(small, folder / "run", None if settings.joint else folder / "refiner")
    # The records of the real cache, as far as their number matters.
    held, kept = (np.broadcast_to(0, count * config.views.count) for count in image_counts(images, settings))
    with watched(process, REHEARSAL):
        if process.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _write(config, shards, tar)
    cache_teacher(small, str(tar), cache)
    if not settings.joint:
        refine(small, cache, folder / "refiner")
    with watched(process, REHEARSAL):  # the cache is there until all have built the student
        sources = open_teachers(settings, cache, spec.refiner)
        check_shared([spec])
        check_fsdp(settings.precision)
        check_spec(spec, sources)
        if settings.share < 1:
            check_scores(sources[0].cache, settings.share_by)
        NewStudent(spec, sources, make_accelerator(settings.precision), (kept, held))


def _remove(folder: Path, process: PartialState) -> None:
    if process.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)


def _write(config: Config, shards: Sequence[str], tar: Path) -> None:
    """Write images from all over the shards to a tar, some of two classes if there are labels."""
    listed = list_images(config, shards)
    _, firsts = np.unique(listed.labels, return_index=True)
    labelled = firsts[listed.labels[firsts] != NO_LABEL][:2]
    images = listed.select(np.union1d(np.linspace(0, len(listed) - 1, _IMAGES).astype(int), labelled))
    with ImageFile(images) as files:
        if config.data.on_error == "fail":
            for number in range(len(images)):
                files.read(number)  # names the image in the user's own file
        Sample(config, images, files, image_size=1).write_tar(tar, range(len(images)))
