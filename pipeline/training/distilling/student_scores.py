"""Score the images of a cache by the loss of a student that was trained before (distill.share_by=loss)."""

from pathlib import Path

import numpy as np
import torch

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import first_views
from pipeline.config import Config
from pipeline.data import Spec
from pipeline.data.sampler import BatchIndices
from pipeline.models.loading import load_saved
from pipeline.models.names import OWN, is_function
from pipeline.outputs.provenance import read_inputs
from pipeline.runtime.progress import meter, say
from pipeline.storage.tensors import read_matrix, read_tensors
from pipeline.training.batch import BatchLoader
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.distilling.distiller import Distiller
from pipeline.training.distilling.targets import Targets
from pipeline.training.distilling.teacher_branch import TeacherBranch, Teaching
from pipeline.training.refining.stored_refiners import find_refiner, load_refiner
from pipeline.training.run_directory import PROJECTORS_FILE, DistillResult, TeacherLink, load_result, load_run_config
from pipeline.training.to_device import on_device
from singer.errors import UserError
from singer.objectives import OBJECTIVES
from singer.refiner import Refiner

_BATCH = 64


class StudentScores:
    """A finished run with all that was trained in it, whose loss is computed for single images.

    Raises UserError if the run learned from another cache, if its loss is not one of single images, or if a part of it
    is missing.
    """

    def __init__(self, run: Path, cache: Cache, device: torch.device) -> None:
        self.run, self.device = run, device
        try:
            result, config = load_result(run), load_run_config(run)
            _check(run, result, config, cache)
            link = result.teachers[0]
            self.settings = settings = config.distill
            self.cache = Cache(cache.place, cache.manifest.teacher.variant, sorted(link.matching))
            self.student = load_saved(result.student)
            # The learner looks which weights have a gradient. None is computed later.
            self.student.model.requires_grad_(True)
            texts = read_matrix(settings.texts) if settings.texts is not None else None
            targets = Targets(self.cache, _refiner(run, link, self.cache), self.student, device, texts)
            teaching = Teaching(settings.objectives, settings.projector, settings.weights_of(self.cache.blocks))
            branch = TeacherBranch(self.student, link.matching, targets, teaching)
            self.learner = Distiller(self.student, [branch]).to(device).eval()
            _load_trained(self.learner, run / PROJECTORS_FILE)
        except UserError as error:
            raise UserError(f"distill.share_run: {error}") from error

    @torch.no_grad()
    def of_images(self, images: Spec | None, workers: int) -> np.ndarray:
        """Return the loss of the first view of every image, (images,), in the order of np.unique(cache.index.image).

        It is computed in float32, and the student sees all patches. images: where they are, if they moved.
        """
        seen = self.settings.share * (1 - self.settings.holdout)
        say(f"images are scored by the loss of {self.run}, which was trained on {100 * seen:.3g} % of them")
        records, losses = first_views(self.cache), []
        parts = (records[start : start + _BATCH] for start in range(0, len(records), _BATCH))
        lists = [[BatchIndices(part, np.ones(len(part), np.float32))] for part in parts]
        with open_images(self.cache, images) as files, meter("score images", len(records), "images") as m:
            load = BatchLoader([self.cache], files, [self.student.image_size])
            for batch in on_device(load(lists, workers), self.device):
                (found,) = self.learner.branch_losses(batch, self.learner.outputs(batch))
                losses.append(torch.stack(list(found.records.values())).sum(0).cpu())
                m.advance(len(batch.weights))
        return torch.cat(losses).double().numpy()


def _check(run: Path, result: DistillResult, config: Config, cache: Cache) -> None:
    """Raise UserError unless the run says of each image of the cache what its loss is."""
    if result.finetuned is not None:
        raise UserError(f"{run} was fine-tuned with labels; give the run of singer distill before it")
    if len(result.teachers) > 1:
        raise UserError(f"{run} learned from several caches; give one that learned from {cache.place} alone")
    learned_from = result.teachers[0].cache
    if learned_from not in cache.ids:
        raise UserError(f"{run} learned from cache {learned_from[:12]}, but {cache.place} is {cache.id[:12]}")
    if config.distill.joint:
        raise UserError(f"{run} trained its targets too (distill.joint); give one with a refiner, or without")
    for name in config.distill.objectives:
        if OBJECTIVES[name].batchwise:
            raise UserError(f"objective {name} of {run} has no loss of single images; give a run with another one")
    if config.student.name.startswith(OWN) or is_function(config.student.name):
        raise UserError(
            f"the student of {run} is a module of your own, and a run's files may not choose code; "
            "give the run of a timm student"
        )


def _refiner(run: Path, link: TeacherLink, cache: Cache) -> Refiner | None:
    """Load the refiner that a run learned from, if any. Raises UserError if it is not found."""
    digest = read_inputs(run).get("refiner")
    if digest is None:
        return None
    folder = find_refiner(run, link, digest)
    if folder is None:
        raise UserError(f"the refiner that {run} learned from is not at {link.refiner} any more; put it there")
    return load_refiner(folder, cache)


def _load_trained(learner: Distiller, file: Path) -> None:
    """Load what was trained with a student. Raises UserError if the file has other tensors."""
    # No loss of single images is one of masked patches.
    stored = {name: x for name, x in read_tensors(file).items() if not name.startswith("masks.")}
    names = {n: n.removeprefix("projectors.") for n in learner.state_dict() if not n.startswith("student.")}
    try:
        if stored.keys() != {*names.values()}:
            raise RuntimeError("it has other tensors")
        learner.load_state_dict({name: stored[short] for name, short in names.items()}, strict=False)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the cache: {str(error).splitlines()[-1].strip()}") from None
