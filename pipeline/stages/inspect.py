"""What a cache holds, and what a refiner changes: norms, artifacts, drift at the teacher's readers, pictures.

A reader is a part of the teacher that reads the output of a block: the next block's branch, the norm before it, and
the final norm. Drift is how much its output changes if it reads refined tokens. The figures called spliced
are of the teacher's predictions when refined tokens replace the output of one block and the rest of the teacher runs on
them.

Run it with `singer inspect CACHE [--refiner REFINER] [--out FOLDER]`. The figures come from held-out records; with a
refiner, they come from the records that it was not fitted on. The thresholds are the refiner's, or come from the
records that were not held out.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced, gather_context, measure_blocks, measure_scales
from pipeline.config import Config
from pipeline.data import Spec
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.reports.html import as_data_url, render, without_ticks
from pipeline.runtime.devices import default_device
from pipeline.runtime.progress import say
from pipeline.storage import Place, write_atomic
from pipeline.storage.json_files import write_json
from pipeline.training.cached_teachers import open_images
from pipeline.training.stored_refiners import OPTION, load_refiner, open_refined, read_refiner, split_records
from singer.artifacts import norm_summary, patch_norms
from singer.diagnostics import (
    artifact_direction,
    artifact_map,
    loss_share,
    norm_quantiles,
    reader_drift,
    splice,
)
from singer.errors import UserError
from singer.fit_context import FitContext
from singer.maps import cosine_to
from singer.refiner import Refiner
from singer.sizes import Size

STAGE = "inspect"
_SHOWN = 6
_PIXELS = 224


@dataclass(frozen=True)
class InspectResult:
    """The figures of every block.

    blocks: {block: {"threshold", "norms", "artifacts", "direction", "loss_share"} and, with a refiner, {"refined",
    "drift", "spliced", "loss_share_refined", "clean_drift_percent"}}; page: the HTML page, if --out was given.
    """

    cache: str
    refiner: str | None
    records: int
    blocks: dict[int, dict[str, Any]]
    page: Path | None


@dataclass(frozen=True)
class _BlockData:
    """The data of a block for the page.

    norms: (n, patches); where: map (rows, columns) of the percentage of images with an artifact; maps: {title: patch
    norms (n, rows, columns)}; similar: {title: cosines to the middle patch (n, rows, columns)}.
    """

    block: int
    norms: Tensor
    where: Tensor | None
    maps: dict[str, Tensor]
    similar: dict[str, Tensor]


def inspect(
    config: Config,
    cache_path: Place,
    refiner: Path | None = None,
    out: Path | None = None,
    mode: Mode = "new",
    images: Spec | None = None,
) -> InspectResult:
    """Measure a cache, and a refiner if one is given, on at most refine.sample_records records.

    images: where the images are, if they moved; if they are not found, the page has no images. Raises UserError for
    mistakes that the user can fix.
    """
    settings = config.refine
    teacher, blocks, local_copy = settings.teacher, settings.blocks, settings.copies
    manifest = read_refiner(refiner) if refiner is not None else None
    if refiner is not None:
        cache = open_refined(refiner, cache_path, teacher, blocks, local_copy, OPTION)
    else:
        cache = Cache(cache_path, teacher, blocks, local_copy, option=OPTION)
    if out is not None:
        check_output(out, mode, STAGE, config, [cache_path, *filter(None, [refiner])])
    loaded = load_refiner(refiner, cache) if refiner is not None else None
    device = default_device()
    if manifest is not None:
        settings = settings.model_copy(update={"seed": manifest.seed, "holdout": manifest.holdout})
    train, held_out = split_records(cache, settings)
    scales = (
        manifest.scales
        if manifest is not None
        else measure_scales(cache, evenly_spaced(train, settings.statistics_records), settings.threshold_k)
    )
    sample = evenly_spaced(held_out, settings.sample_records)
    suffix = cache.suffix().to(device) if cache.has_suffix else None
    loaded = loaded.to(device) if loaded is not None else None
    metrics, block_data, chosen = {}, [], np.empty(0, np.int64)
    measured = measure_blocks(cache, loaded, scales, sample, device) if loaded is not None else {}
    for block in cache.blocks:
        say(f"block {block}")
        context = gather_context(cache, sample, block, scales[block], suffix, device, settings.seed)
        metrics[block] = _block_metrics(context, loaded)
        if block in measured:
            metrics[block]["refined"] = measured[block]["after"]
            metrics[block]["clean_drift_percent"] = measured[block]["clean_drift_percent"]
        if not len(chosen):
            chosen = _choose(context)
        block_data.append(_block_data(context, loaded, chosen))
    result = InspectResult(
        cache=cache.id,
        refiner=str(refiner) if refiner is not None else None,
        records=len(sample),
        blocks=metrics,
        page=out / "inspect.html" if out is not None else None,
    )
    if out is not None:
        with claimed_output(out, mode, STAGE, config, settings.seed):
            write_json(out / "inspect.json", {**asdict(result), "page": None})
            write_atomic(out / "inspect.html", _page(cache, result, block_data, sample[chosen], images).encode())
    return result


def _block_metrics(context: FitContext, refiner: Refiner | None) -> dict[str, Any]:
    norms = patch_norms(context.tokens, context.prefix)
    metrics: dict[str, Any] = {
        "threshold": context.scale.threshold,
        "norms": norm_quantiles(norms),
        "artifacts": norm_summary(norms, context.scale.threshold),
        "direction": artifact_direction(context),
        "loss_share": loss_share(context),
    }
    if refiner is not None:
        clean = _cleaner(refiner, context.block)
        # Without a grid, the cache holds only a share of the patches, but the teacher's blocks read all of them.
        readable = context.grid is not None and context.teacher_suffix is not None
        metrics |= {
            "drift": reader_drift(context, clean) if readable else {},
            "spliced": splice(context, clean) if readable else {},
            # It is measured on the targets of a student: the normaliser may enlarge artifacts that the cleaner left.
            "loss_share_refined": loss_share(context, lambda x: refiner({context.block: x})[context.block]),
        }
    return metrics


def _cleaner(refiner: Refiner, block: int) -> Callable[[Tensor], Tensor]:
    return lambda tokens: refiner.clean(tokens, block)


def _choose(context: FitContext) -> np.ndarray:
    """Return the records for pictures: half of them have the largest patch norms, the others are the first ones."""
    largest = patch_norms(context.tokens, context.prefix).amax(1).cpu().numpy()
    worst = np.argsort(-largest, kind="stable")[: _SHOWN // 2]
    others = np.setdiff1d(np.arange(len(largest)), worst)[: _SHOWN - len(worst)]
    return np.concatenate([worst, others])


def _block_data(context: FitContext, refiner: Refiner | None, chosen: np.ndarray) -> _BlockData:
    """Return what the page shows of a block; without a grid, these are only the norms."""
    norms = patch_norms(context.tokens, context.prefix).cpu()
    if context.grid is None:
        return _BlockData(context.block, norms, None, {}, {})
    kinds = {"teacher": context.tokens[torch.from_numpy(chosen)]}
    if refiner is not None:
        kinds["refined"] = refiner.clean(kinds["teacher"], context.block)
    rows, columns = context.grid
    marked = (rows // 2) * columns + columns // 2
    patches = {name: x[:, context.prefix :].cpu() for name, x in kinds.items()}
    return _BlockData(
        context.block,
        norms,
        artifact_map(context).cpu(),
        {name: x.norm(dim=-1).unflatten(1, context.grid) for name, x in patches.items()},
        {name: cosine_to(x, torch.full((len(x),), marked)).unflatten(1, context.grid) for name, x in patches.items()},
    )


def _page(
    cache: Cache,
    result: InspectResult,
    block_data: list[_BlockData],
    records: np.ndarray,
    images: Spec | None,
) -> str:
    views = None
    try:
        with open_images(cache, images) as files:
            views = cache.pixels(records, Size.of(cache.manifest.teacher.image_size).within(_PIXELS), files).numpy()
    except UserError as error:
        say(f"the page has no images: {error}")
    pictures = {"norms": _draw_norms(block_data)}
    for part in block_data:
        if part.maps:
            pictures[f"maps of block {part.block}"] = _draw_maps(part, views)
    teacher, place = cache.manifest.teacher, str(cache.place)
    return render(
        Path(__file__).with_name("inspect.html.j2"), result=result, teacher=teacher, place=place, pictures=pictures
    )


def _draw_norms(block_data: list[_BlockData]) -> str:
    """Draw box plots of patch norms by block (the paper's Figure 5), and maps of where artifacts are."""
    wheres = [part for part in block_data if part.where is not None]
    figure = Figure(figsize=(3.2 * (1 + len(wheres)), 3.2), layout="constrained")
    first, *others = np.atleast_1d(figure.subplots(1, 1 + len(wheres)))
    first.boxplot(
        [part.norms.flatten().numpy() for part in block_data],
        tick_labels=[f"block {part.block}" for part in block_data], whis=(1, 99), flierprops={"markersize": 2},
    )  # fmt: skip
    first.set_yscale("log")
    first.set_ylabel("patch norm")
    for axis, part in zip(others, wheres, strict=True):
        assert part.where is not None
        picture = axis.imshow(part.where.numpy(), vmin=0, cmap="magma")
        axis.set_title(f"artifacts, block {part.block}", fontsize=9)
        without_ticks(axis)
        figure.colorbar(picture, ax=axis, shrink=0.7, label="% of images")
    return as_data_url(figure)


def _draw_maps(part: _BlockData, images: np.ndarray | None) -> str:
    """Draw images above maps of patch norms and of the cosine to the middle patch (the paper's Figure 2)."""
    median = float(part.norms.median())
    rows: list[tuple[str, Tensor, dict[str, Any]]] = []
    for name, maps in part.maps.items():
        rows.append((f"{name}\nnorm / median", maps / median, {"vmin": 0, "vmax": 5, "cmap": "viridis"}))
    for name, maps in part.similar.items():
        rows.append((f"{name}\ncosine", maps, {"vmin": -0.2, "vmax": 1, "cmap": "coolwarm"}))
    count, (high, wide) = len(rows[0][1]), rows[0][1].shape[1:]
    figure = Figure(figsize=(1.5 * count, 1.55 * high / wide * (1 + len(rows))), layout="constrained")
    axes = figure.subplots(1 + len(rows), count, squeeze=False)
    for column in range(count):
        if images is not None:
            axes[0, column].imshow(images[column])
        for row, (_, maps, style) in enumerate(rows, start=1):
            axes[row, column].imshow(maps[column].numpy(), **style)
            if style["cmap"] == "coolwarm":
                height, width = maps.shape[1:]
                axes[row, column].plot(width // 2, height // 2, "kx", markersize=5)
    for row, title in enumerate(["image", *(title for title, _, _ in rows)]):
        axes[row, 0].set_ylabel(title, fontsize=9)
    for axis in axes.flat:
        without_ticks(axis)
    return as_data_url(figure)
