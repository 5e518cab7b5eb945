"""Choose the images that students are trained on, and those that are held out to measure students."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import first_views
from pipeline.config import DistillConfig, TrainingConfig
from pipeline.data import Spec
from pipeline.runtime.ranks import current
from pipeline.training.distilling.image_scores import check_scores, image_scores
from pipeline.training.distilling.student_scores import StudentScores
from singer.errors import UserError

# More records would say no more, and take time after every epoch.
_MOST_RECORDS = 2048
# The records to train on, None for all, and those to measure on.
Split = tuple[np.ndarray | None, np.ndarray]


def split_images(cache: Cache, settings: DistillConfig, moved: Spec | None = None) -> Split:
    """Return the records to train on, None for all, and at most 2,048 others to measure on.

    Images are drawn, with all their views, also those that were appended later: distill.holdout of all to measure on,
    and of the others distill.share to train on, by chance or by distill.share_by. moved: where the cached images are,
    if they moved. Raises UserError if there is nothing left to train on, or the images cannot be scored.
    """
    if not settings.holdout and settings.share == 1:
        return None, np.arange(0)
    image = cache.index.first_image
    images = np.random.default_rng([settings.seed, 1]).permutation(np.unique(image))
    held, kept = image_counts(len(images), settings)
    others = images[held:]
    if settings.share < 1 and settings.share_by != "random":
        scores = _scores(cache, settings, moved)[np.searchsorted(np.unique(cache.index.image), others)]
        # Equal scores keep the random order.
        others = others[np.argsort(-scores if settings.share_keep == "hard" else scores, kind="stable")]
    trained = np.isin(image, others[:kept])
    return np.flatnonzero(trained), np.flatnonzero(np.isin(image, images[:held]))[:_MOST_RECORDS]


def image_counts(images: int, settings: DistillConfig) -> tuple[int, int]:
    """Return how many of so many images are held out, and how many are trained on.

    Raises UserError if there is nothing left to train on.
    """
    held = _held(images, settings)
    return held, max(1, round(settings.share * (images - held)))


def held_out_images(count: int, settings: TrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the images to train on, ascending, and of at most 2,048 others to measure on.

    Raises UserError if there is nothing left to train on.
    """
    held = _held(count, settings)
    drawn = np.random.default_rng([settings.seed, 1]).permutation(count)
    return np.sort(drawn[held:]), np.sort(drawn[:held][:_MOST_RECORDS])


def _held(images: int, settings: TrainingConfig) -> int:
    held = max(1, round(settings.holdout * images)) if settings.holdout else 0
    if held >= images:
        raise UserError(f"{settings.section}.holdout: all {images} images would be held out")
    return held


def _scores(cache: Cache, settings: DistillConfig, moved: Spec | None) -> np.ndarray:
    """Return the score of every image, which the first process computes: others might round it in another way."""
    state = PartialState()
    score = image_scorer(cache, settings, moved, state.device)
    if state.num_processes == 1:
        return score()
    scores = score() if state.is_main_process else np.zeros(len(first_views(cache)))
    current().wait()
    with current().together():
        of_first: np.ndarray = broadcast(torch.from_numpy(scores).to(state.device)).cpu().numpy()
    return of_first


def image_scorer(
    cache: Cache, settings: DistillConfig, moved: Spec | None, device: torch.device
) -> Callable[[], np.ndarray]:
    """Return what computes the score of every image. Raises UserError if the cache or the run lacks what it needs."""
    if settings.share_by == "loss":
        assert settings.share_run is not None
        return partial(StudentScores(settings.share_run, cache, device).of_images, moved, settings.workers)
    check_scores(cache, settings.share_by)
    return partial(image_scores, cache, settings.share_by, settings.seed)
