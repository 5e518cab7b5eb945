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
    measure_features,
    norms_of,
    sources_of,
)
from pipeline.reports.runs import RefinerSource, Trained
from pipeline.reports.seeds import SeedGroup
from pipeline.runtime.devices import default_device
from pipeline.training.refining.stored_refiners import read_refiner
from singer.artifacts import robust_threshold
from singer.sizes import Size

_IMAGES = 6
# At most so many students have pictures.
_PICTURED = 6
_PHOTO = 224


@dataclass(frozen=True)
class PageMeasurements:
    """The measurements of a page.

    measurements: of teacher, refined teachers and students with pictures; norms: mean_max_over_median of every run's
    student; threshold: the norm above which a token is an artifact, in the teacher's units; strips: {kind: rows of
    pictures}; more: the number of students without pictures.
    """

    measurements: list[Measurement]
    norms: dict[Trained, float]
    threshold: float
    records: int
    strips: dict[str, list[pictures.Strip]]
    more: int


def measure(
    cache: Cache, groups: Sequence[SeedGroup], files: ImageFile | None, count: int, functions: Sequence[str] = ()
) -> PageMeasurements:
    """Measure all models on `count` records.

    groups: best first; files: the images, if the cache does not hold them; functions: those that make students of the
    user's own.
    """
    device = default_device()
    records = evenly_spaced(np.arange(len(cache)), count)
    firsts = [group.runs[0] for group in groups]
    matched = [b for b in firsts[0].link.matching if b in cache.blocks]
    block = max(matched or cache.blocks)
    norms = norms_of(cache, records, device)
    threshold = _threshold(firsts, norms[block], block)
    sample = Sample(records, choose_shown(norms[block], threshold, _IMAGES))
    students = Students(cache, files, sample, device, functions)
    measured = {run: students.measure(run, group.name, block) for group in groups for run in group.runs}
    ratios = {run: measurement.mean_max_over_median for run, measurement in measured.items()}
    pictured = choose_pictured(firsts, ratios)
    sources = [source for source in sources_of(pictured) if source.cleans]
    measurements = [measure_features(cache, "teacher", block, sample, device)]
    for source in sources:
        title = _source_title(source, sources, pictured)
        measurements.append(measure_features(cache, title, block, sample, device, source))
    measurements += [measured[run] for run in pictured]
    photo = Size.of(cache.manifest.teacher.image_size).within(_PHOTO)
    images = cache.pixels(records[sample.shown], photo, files).numpy()
    grid = cache.manifest.teacher.grid_of(block)
    places = pictures.choose_places(measurements)
    plain, marked = pictures.photos(images, grid), pictures.photos(images, grid, places)
    strips = {
        "norms": [plain, *pictures.norm_strips(measurements)],
        "cosines": [marked, *pictures.cosine_strips(measurements, places)],
        "components": [plain, *pictures.pca_strips(measurements)],
    }
    return PageMeasurements(measurements, ratios, threshold, len(records), strips, len(groups) - len(pictured))


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
