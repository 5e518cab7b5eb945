"""Patch norms, and patches for pictures, of teacher, refined teacher and students on the same images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import batches, evenly_spaced, spec_of
from pipeline.data import ImageFile
from pipeline.data.views import normalise
from pipeline.models.loading import load_saved
from pipeline.models.names import OWN, is_function
from pipeline.reports.runs import RefinerSource, Trained
from pipeline.runtime.buffers import moved
from pipeline.runtime.progress import meter
from pipeline.storage.tensors import read_tensors
from pipeline.training.refining.stored_refiners import load_refiner, read_refiner
from pipeline.training.run_directory import ADAPTERS
from singer.artifacts import patch_norms
from singer.backbones import block_outputs, depth
from singer.errors import UserError
from singer.refiner import Refiner
from singer.sizes import ImageSize

Kind = Literal["teacher", "refined", "student"]
_BATCH = 32


@dataclass(frozen=True)
class Measurement:
    """The norms of a model on the measured images, and its patches on the shown ones.

    block: the block that is shown; grid: (rows, columns) of its patches, or None if the cache stores only some; norms:
    {block: patch norms (n, P)}; patches: (shown, P, d) of `block`, or None without a grid. All are on the CPU.
    """

    title: str
    kind: Kind
    block: int
    grid: tuple[int, int] | None
    norms: dict[int, Tensor]
    patches: Tensor | None

    @property
    def mean_max_over_median(self) -> float:
        """Return the mean over the images of (largest patch norm / median of all norms), at `block`."""
        norms = self.norms[self.block]
        return float((norms.amax(1) / norms.median()).mean())

    def above(self, threshold: float) -> float:
        """Return the share (%) of the patches at `block` with a norm above the threshold."""
        # A token that was clipped to the threshold may exceed it by rounding, and does not count.
        return 100 * float((self.norms[self.block] > threshold * (1 + 1e-5)).float().mean())


@dataclass(frozen=True)
class Sample:
    """The records of a cache that are measured, and the rows of `records` that are shown."""

    records: np.ndarray
    shown: np.ndarray


def choose_shown(norms: Tensor, threshold: float, count: int) -> np.ndarray:
    """Return `count` rows of patch norms (n, P), spread evenly over the rows with an artifact.

    If fewer than `count` rows have one, they are spread over all rows.
    """
    rows = np.arange(len(norms))
    with_artifact = rows[(norms > threshold).any(1).numpy()]
    return evenly_spaced(with_artifact if len(with_artifact) >= count else rows, count)


@torch.no_grad()
def norms_of(
    cache: Cache, records: np.ndarray, device: torch.device, refiner: Refiner | None = None
) -> dict[int, Tensor]:
    """Return {block: patch norms (n, P)} of cached features, refined if there is a refiner, on the CPU."""
    prefix = cache.manifest.teacher.prefix_tokens
    found: dict[int, list[Tensor]] = {b: [] for b in cache.blocks}
    for features in batches(cache, records, device):
        for block, x in features.items():
            found[block].append(patch_norms(x if refiner is None else refiner.clean(x, block), prefix).cpu())
    return {block: torch.cat(parts) for block, parts in found.items()}


def measure_features(
    cache: Cache, title: str, block: int, sample: Sample, device: torch.device, source: RefinerSource | None = None
) -> Measurement:
    """Measure the teacher or, with a source, the refined teacher before its normaliser, in the teacher's units."""
    refiner = None
    if source is not None:
        cache, refiner = load_source(cache, source)
        refiner = refiner.to(device)
        block = block if block in cache.blocks else max(cache.blocks)
    norms = norms_of(cache, sample.records, device, refiner)
    grid = None if cache.manifest.sampled else cache.manifest.teacher.grid_of(block)
    patches = None
    if grid is not None:
        x = cache.features(sample.records[sample.shown], device)[block]
        x = x if refiner is None else refiner.clean(x, block)
        patches = x[:, cache.manifest.teacher.prefix_tokens :].cpu()
    return Measurement(title, "teacher" if source is None else "refined", block, grid, norms, patches)


def load_source(cache: Cache, source: RefinerSource) -> tuple[Cache, Refiner]:
    """Return the cache, opened for the blocks of a refiner, and that refiner, frozen.

    Raises UserError if the refiner is damaged.
    """
    if not source.joint:
        part = Cache(cache.place, None, tuple(read_refiner(source.folder).scales), known=cache.id)
        return part, load_refiner(source.folder, part)
    # A run with joint training keeps only the tensors of its adapters.
    state = read_tensors(source.folder / ADAPTERS)
    ranks = {int(name.split(".")[1]): x.shape[1] for name, x in state.items() if name.endswith(".down")}
    part = Cache(cache.place, None, tuple(ranks), known=cache.id)
    refiner = Refiner({b: spec_of(part, b, rank) for b, rank in ranks.items()}, "adapter", "none")
    try:
        refiner.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{source.folder / ADAPTERS} is damaged: {str(error).splitlines()[0]}") from None
    return part, refiner.requires_grad_(False)


class Students:
    """The students' measurements on the sampled images, which are read once for each resolution."""

    def __init__(
        self, cache: Cache, files: ImageFile | None, sample: Sample, device: torch.device, functions: Sequence[str]
    ) -> None:
        self._cache, self._files, self._sample, self._device = cache, files, sample, device
        self._functions = functions
        self._pixels: dict[ImageSize, Tensor] = {}

    def pixels(self, size: ImageSize) -> Tensor:
        """Return the sampled images, (n, height, width, 3) uint8."""
        if size not in self._pixels:
            self._pixels[size] = self._cache.pixels(self._sample.records, size, self._files)
        return self._pixels[size]

    def _function(self, run: Trained) -> str | None:
        """Return the function that makes a run's student, if it is of the user's own. A run chooses no code to run.

        Raises UserError if the user named none.
        """
        name = run.config.student.name
        if not (name.startswith(OWN) or is_function(name)):
            return None
        if name in self._functions or (name.startswith(OWN) and len(self._functions) == 1):
            return name if name in self._functions else self._functions[0]
        raise UserError(
            f"{run.result.run} is of a module of your own; name the function that makes it, with --student "
            f"{name if is_function(name) else 'package.module:function'}"
        )

    @torch.inference_mode()
    def measure(self, run: Trained, title: str, block: int | None = None) -> Measurement:
        """Measure a run's student; block: a teacher's block, of which the match is shown, by default the last one."""
        student = load_saved(run.result.student, function=self._function(run))
        student.model.to(self._device)
        matching = run.link.matching
        own = matching.get(block, max(matching.values())) if block is not None else max(matching.values())
        blocks = range(depth(student.model))
        norms: dict[int, list[Tensor]] = {b: [] for b in blocks}
        kept: list[Tensor] = []
        shown = set(self._sample.shown.tolist())
        pixels = self.pixels(student.image_size)
        with meter(title, len(pixels), "images") as m:
            for start in range(0, len(pixels), _BATCH):
                part = moved(pixels[start : start + _BATCH], self._device)
                outputs = block_outputs(student.model, normalise(part, student.mean, student.std), list(blocks))
                for b, x in outputs.items():
                    norms[b].append(patch_norms(x, student.prefix).cpu())
                rows = [i for i in range(len(part)) if start + i in shown]
                kept.append(outputs[own][rows, student.prefix :].float().cpu())
                m.advance(len(part))
        return Measurement(
            title, "student", own, student.layout[own][1], {b: torch.cat(n) for b, n in norms.items()}, torch.cat(kept)
        )


def sources_of(runs: Iterable[Trained]) -> list[RefinerSource]:
    """Return the refiners of some runs, each once."""
    return list({(s.hash, s.title): s for run in runs if (s := run.source) is not None}.values())
