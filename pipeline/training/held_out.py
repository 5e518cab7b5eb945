"""Measure students on images that they are not trained on, after every epoch."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import first_views
from pipeline.config import DistillConfig, TrainingConfig
from pipeline.data import Spec
from pipeline.data.sampler import BatchIndices
from pipeline.runtime.ranks import current
from pipeline.training.batch import Loader
from pipeline.training.image_scores import check_scores, image_scores
from pipeline.training.student_loss import StudentLoss
from pipeline.training.student_run import StudentRun
from pipeline.training.to_device import on_device
from singer.errors import UserError

# More records would say no more, and take time after every epoch.
_MOST_RECORDS = 2048
# The records to train on, None for all, and those to measure on.
Split = tuple[np.ndarray | None, np.ndarray]


def split_images(cache: Cache, settings: DistillConfig, moved: Spec | None = None) -> Split:
    """Return the records to train on, None for all, and at most 2,048 others to measure on.

    Images are drawn, with all their views: distill.holdout of all to measure on, and of the others distill.share to
    train on, by chance or by distill.share_by. moved: where the cached images are, if they moved. Raises UserError if
    there is nothing left to train on, or the images cannot be scored.
    """
    if not settings.holdout and settings.share == 1:
        return None, np.arange(0)
    image = cache.index.image
    images = np.random.default_rng([settings.seed, 1]).permutation(np.unique(image))
    held, kept = image_counts(len(images), settings)
    others = images[held:]
    if settings.share < 1 and settings.share_by != "random":
        scores = _scores(cache, settings, moved)[np.searchsorted(np.unique(image), others)]
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
    score = _score(cache, settings, moved, state.device)
    if state.num_processes == 1:
        return score()
    scores = score() if state.is_main_process else np.zeros(len(first_views(cache)))
    current().wait()
    with current().together():
        of_first: np.ndarray = broadcast(torch.from_numpy(scores).to(state.device)).cpu().numpy()
    return of_first


def _score(cache: Cache, settings: DistillConfig, moved: Spec | None, device: torch.device) -> Callable[[], np.ndarray]:
    """Return what computes the score of every image. Raises UserError if the cache or the run lacks what it needs."""
    if settings.share_by == "loss":
        assert settings.share_run is not None
        return partial(StudentLoss(settings.share_run, cache, device).of_images, moved, settings.workers)
    check_scores(cache, settings.share_by)
    return partial(image_scores, cache, settings.share_by, settings.seed)


class HeldOut:
    """The records that are held out, and how students do on them."""

    def __init__(self, load: Loader, settings: TrainingConfig) -> None:
        self.load, self.settings = load, settings

    @torch.no_grad()
    def measure(self, student_runs: Sequence[StudentRun], device: torch.device) -> list[dict[str, object]]:
        """Return for each student its held_out_loss, and what Learner.figures says.

        Students see all patches, and are what would be stored: moving averages, where there are some. All processes
        compute the same.
        """
        size, count = self.settings.batch_size, len(self.load)
        starts = range(0, count, size)
        shares = [np.arange(start, min(start + size, count)) for start in starts]
        lists = [[BatchIndices(part, np.full(len(part), 1 / count, np.float32))] for part in shares]
        losses, own = [0.0] * len(student_runs), [device] if device.type == "cuda" else []
        sums: list[dict[str, torch.Tensor]] = [{} for _ in student_runs]
        with ExitStack() as averages:
            for run in student_runs:
                run.learner.eval()
                averages.enter_context(run.averaged())
            for number, batch in enumerate(on_device(self.load(lists, self.settings.workers), device)):
                if len(student_runs) > 1:
                    batch = student_runs[0].learner.decoded(batch)
                for n, run in enumerate(student_runs):
                    # Objectives that draw at random draw the same in every epoch, whoever shares the pass.
                    with torch.random.fork_rng(own), current().together():  # split weights are gathered
                        torch.manual_seed(number)
                        found, parts = run.learner(batch)
                    current().beat()
                    losses[n] += float(torch.stack(list(found.values())).sum())
                    for name, part in parts.items():
                        sums[n][name] = sums[n].get(name, 0) + part
        for run in student_runs:
            run.learner.train()
        return [
            {"held_out_loss": loss, **run.learner.figures(of_run)}
            for run, loss, of_run in zip(student_runs, losses, sums, strict=True)
        ]
