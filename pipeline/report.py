"""The demo's report: one HTML page that shows what refinement did, with no other file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.cache.info import cache_info
from pipeline.cache.reader import Cache
from pipeline.cache_teacher import CacheResult
from pipeline.checkpoint import read_log
from pipeline.distill import LOG, DistillResult, open_images
from pipeline.figures import as_data_url, render, without_ticks
from pipeline.models import load_saved
from pipeline.probes.classification import Classification
from pipeline.refine import RefineResult, load_refiner
from pipeline.stores import write_atomic
from pipeline.views import normalise
from singer.artifacts import patch_norms
from singer.backbones import block_outputs, depth

_SHOWN = 6
_MEASURED = 256


@dataclass(frozen=True)
class DemoReport:
    """What the page tells: the results of every stage; probes also hold the teacher's. note: what to know first."""

    cached: CacheResult
    refined: RefineResult
    students: dict[str, DistillResult]
    probes: dict[str, Classification]
    note: str


@dataclass(frozen=True)
class Norms:
    """Patch norms of some records. images (n, size, size, 3) uint8; maps: {title: (n, rows, columns)}."""

    images: np.ndarray
    maps: dict[str, Tensor]

    def max_over_median(self) -> dict[str, float]:
        """Mean over images of the largest norm over the median of all."""
        return {k: float((m.flatten(1).amax(1) / m.median()).mean()) for k, m in self.maps.items()}


def write_report(report: DemoReport, path: Path) -> dict[str, float]:
    """Write the page; returns max / median of the patch norms it shows, by title."""
    norms = measure_norms(report)
    ratios = norms.max_over_median()
    page = render(
        "report.html.j2",
        report=report,
        info=cache_info(report.cached.cache).teachers[0],
        ratios=ratios,
        figures={"norm maps": draw_norm_maps(norms), "losses": draw_losses(report.students)},
    )
    write_atomic(path, page.encode())
    return ratios


@torch.inference_mode()
def measure_norms(report: DemoReport) -> Norms:
    """Patch norms at the last cached block: teacher raw and refined (still in its units), and at the students' last."""
    cache = Cache(report.cached.cache)
    refiner = load_refiner(report.refined.adapters, cache)
    records = np.linspace(0, len(cache) - 1, min(_MEASURED, len(cache))).astype(int)
    block = cache.blocks[-1]
    prefix, grid = cache.manifest.teacher.prefix_tokens, cache.manifest.teacher.grid
    x = cache.features(records, torch.device("cpu"))[block]
    maps = {
        "teacher": patch_norms(x, prefix).unflatten(1, grid),
        "refined teacher": patch_norms(refiner.clean(x, block), prefix).unflatten(1, grid),
    }
    with open_images(cache) as files:
        for name, run in report.students.items():
            student = load_saved(run.student)
            images = cache.pixels(records, student.image_size, files)
            pixels = normalise(images, student.mean, student.std, torch.device("cpu"))
            last = depth(student.model) - 1
            tokens = block_outputs(student.model, pixels, [last])[last]
            maps[f"{name} student"] = patch_norms(tokens, student.prefix).unflatten(1, student.grid)
    return Norms(images.numpy(), maps)


def draw_norm_maps(norms: Norms) -> str:
    """Images beside the norm maps of every model, each map in units of its model's median."""
    figure = Figure(figsize=(1.5 * _SHOWN, 1.55 * (1 + len(norms.maps))), layout="constrained")
    axes = figure.subplots(1 + len(norms.maps), _SHOWN)
    for column in range(_SHOWN):
        axes[0, column].imshow(norms.images[column])
        for row, values in enumerate(norms.maps.values(), start=1):
            relative = (values[column] / values.median()).numpy()
            picture = axes[row, column].imshow(relative, vmin=0, vmax=5, cmap="viridis")
    for row, title in enumerate(["image", *norms.maps]):
        axes[row, 0].set_ylabel(title, fontsize=9)
    for axis in axes.flat:
        without_ticks(axis)
    figure.colorbar(picture, ax=axes[1:, :], shrink=0.5, label="patch norm / median", extend="max")
    return as_data_url(figure)


def draw_losses(students: Mapping[str, DistillResult]) -> str:
    """Training loss of every student, relative to its first value: the targets have different units."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis: Axes = figure.subplots()
    for name, run in students.items():
        lines = read_log(run.run / LOG)
        loss = np.array([line["loss"] for line in lines])
        axis.plot([line["epoch"] for line in lines], loss / loss[0], label=name)
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss / first loss")
    axis.legend(frameon=False)
    return as_data_url(figure)
