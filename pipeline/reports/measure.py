"""What is measured for a page: norms of all models on one sample of records, and pictures of some of its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced
from pipeline.data import ImageFile
from pipeline.reports import pictures
from pipeline.reports.measurements import (
    Measurement,
    Sample,
    Students,
    choose_shown,
    look_at_features,
    norms_of,
    sources_of,
)
from pipeline.reports.runs import RefinerSource, Trained
from pipeline.reports.seeds import SeedGroup
from pipeline.runtime.devices import default_device
from pipeline.training.stored_refiners import read_refiner
from singer.artifacts import robust_threshold
from singer.sizes import Size

_IMAGES = 6
# At most so many students have pictures.
_PICTURED = 6
_PHOTO = 224


@dataclass(frozen=True)
class Measurements:
    """The measurements of a page.

    looks: teacher, refined teachers and students with pictures; norms: mean_max_over_median of every run's student;
    threshold: the norm above which a token is an artifact, in the teacher's units; strips: {kind: rows of pictures};
    more: the number of students without pictures.
    """

    looks: list[Measurement]
    norms: dict[Trained, float]
    threshold: float
    records: int
    strips: dict[str, list[pictures.Strip]]
    more: int


def measure(
    cache: Cache, groups: Sequence[SeedGroup], files: ImageFile | None, count: int, functions: Sequence[str] = ()
) -> Measurements:
    """Measure all models on `count` records.

    groups: best first; files: the images, if the cache does not hold them; functions: those that make students of the
    user's own.
    """
    device = default_device()
    records = evenly_spaced(np.arange(len(cache)), count)
    firsts = [group.runs[0] for group in groups]
    matched = [b for b in firsts[0].result.matching if b in cache.blocks]
    block = max(matched or cache.blocks)
    norms = norms_of(cache, records, device)
    threshold = _threshold(firsts, norms[block], block)
    sample = Sample(records, choose_shown(norms[block], threshold, _IMAGES))
    students = Students(cache, files, sample, device, functions)
    seen = {run: students.look(run, group.name, block) for group in groups for run in group.runs}
    ratios = {run: look.mean_max_over_median for run, look in seen.items()}
    pictured = choose_pictured(firsts, ratios)
    sources = [source for source in sources_of(pictured) if source.cleans]
    looks = [look_at_features(cache, "teacher", block, sample, device)]
    for source in sources:
        looks.append(look_at_features(cache, _source_title(source, sources, pictured), block, sample, device, source))
    looks += [seen[run] for run in pictured]
    photo = Size.of(cache.manifest.teacher.image_size).within(_PHOTO)
    images = cache.pixels(records[sample.shown], photo, files).numpy()
    grid = cache.manifest.teacher.grid_of(block)
    places = pictures.choose_places(looks)
    plain, marked = pictures.photos(images, grid), pictures.photos(images, grid, places)
    strips = {
        "norms": [plain, *pictures.norm_strips(looks)],
        "cosines": [marked, *pictures.cosine_strips(looks, places)],
        "components": [plain, *pictures.pca_strips(looks)],
    }
    return Measurements(looks, ratios, threshold, len(records), strips, len(groups) - len(pictured))


def choose_pictured(runs: Sequence[Trained], ratios: Mapping[Trained, float]) -> list[Trained]:
    """Return the runs to draw, best first; if some are left out, the last one is the run with the largest outliers."""
    best, rest = list(runs[:_PICTURED]), runs[_PICTURED:]
    worst = max(runs, key=lambda run: ratios[run])
    return [*best[:-1], worst] if worst in rest else best


def _threshold(runs: Sequence[Trained], norms: Tensor, block: int) -> float:
    """Return the threshold of artifacts at a block: the refiner's, or else that of the measured records."""
    for run in runs:
        if run.source is not None and not run.source.joint:
            scale = read_refiner(run.source.folder).scales.get(block)
            if scale is not None:
                return scale.threshold
    return robust_threshold(norms, runs[0].config.refine.threshold_k)


def _source_title(source: RefinerSource, sources: Sequence[RefinerSource], runs: Sequence[Trained]) -> str:
    if len(sources) == 1:
        return "refined teacher"
    if [s.title for s in sources].count(source.title) == 1:
        return f"refined: {source.title}"
    return f"refined for {next(r.name for r in runs if r.source is not None and r.source.hash == source.hash)}"
