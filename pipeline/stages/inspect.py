"""What a cache holds, and what a refiner changes: norms, artifacts, drift at the teacher's readers, pictures.

A reader is a part of the teacher that reads the output of a block: the next block's branch, the norm before it, and
the final norm. Drift is how much its output changes if it reads refined tokens. The figures called spliced
are of the teacher's predictions when refined tokens replace the output of one block and the rest of the teacher runs on
them.

Run it with `singer inspect CACHE [--refiner REFINER] [--out FOLDER]`. The figures come from held-out records; with a
refiner, they come from the records that it was not fitted on. The thresholds are the refiner's, or come from the
records that were not held out.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced, gather_context, measure_blocks, measure_scales
from pipeline.config import Config
from pipeline.data import Spec
from pipeline.outputs.folder import Mode, check_output, claimed_output
from pipeline.reports.inspect_page import BlockPictures, render_inspect_page
from pipeline.runtime.devices import default_device, own_settings
from pipeline.runtime.progress import say
from pipeline.storage import Place, write_atomic
from pipeline.storage.json_files import write_json
from pipeline.training.distilling.cached_teachers import open_images
from pipeline.training.refining.stored_refiners import OPTION, load_refiner, open_refined, read_refiner, split_records
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


@own_settings()
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
    if out is not None:
        check_output(out, mode, STAGE, config, [cache_path, *filter(None, [refiner])])
    settings, device = config.refine, default_device()
    teacher, blocks, local_copy = settings.teacher, settings.blocks, settings.local_copies
    if refiner is not None:
        cache = open_refined(refiner, cache_path, teacher, blocks, local_copy, OPTION)
        manifest, loaded = read_refiner(refiner), load_refiner(refiner, cache).to(device)
        settings = settings.model_copy(update={"seed": manifest.seed, "holdout": manifest.holdout})
        scales, (_, held_out) = manifest.scales, split_records(cache, settings)
    else:
        cache, loaded = Cache(cache_path, teacher, blocks, local_copy, option=OPTION), None
        train, held_out = split_records(cache, settings)
        known = evenly_spaced(train, settings.statistics_records)
        scales = measure_scales(cache, known, settings.threshold_k, device)
    sample = evenly_spaced(held_out, settings.sample_records)
    suffix = cache.suffix().to(device) if cache.has_suffix else None
    metrics, pictures, chosen = {}, [], np.empty(0, np.int64)
    measured = measure_blocks(cache, loaded, scales, sample, device) if loaded is not None else {}
    for block in cache.blocks:
        say(f"block {block}")
        context = gather_context(cache, sample, block, scales[block], suffix, device, settings.seed)
        metrics[block] = _block_metrics(context, loaded)
        if block in measured:
            metrics[block]["refined"] = measured[block]["after"]
            metrics[block]["clean_drift_percent"] = measured[block]["clean_drift_percent"]
        if not len(chosen):  # the first block chooses for all
            chosen = _choose(context)
        pictures.append(_pictures(context, loaded, chosen))
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
            page = render_inspect_page(cache, asdict(result), pictures, _views(cache, sample[chosen], images))
            write_atomic(out / "inspect.html", page.encode())
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
        clean = partial(refiner.clean, block=context.block)
        # Without a grid, the cache holds only a share of the patches, but the teacher's blocks read all of them.
        readable = context.grid is not None and context.teacher_suffix is not None
        metrics |= {
            "drift": reader_drift(context, clean) if readable else {},
            "spliced": splice(context, clean) if readable else {},
            # It is measured on the targets of a student: the normaliser may enlarge artifacts that the cleaner left.
            "loss_share_refined": loss_share(context, lambda x: refiner({context.block: x})[context.block]),
        }
    return metrics


def _choose(context: FitContext) -> np.ndarray:
    """Return the records for pictures: half of them have the largest patch norms, the others are the first ones."""
    largest = patch_norms(context.tokens, context.prefix).amax(1).cpu().numpy()
    worst = np.argsort(-largest, kind="stable")[: _SHOWN // 2]
    others = np.setdiff1d(np.arange(len(largest)), worst)[: _SHOWN - len(worst)]
    return np.concatenate([worst, others])


def _pictures(context: FitContext, refiner: Refiner | None, chosen: np.ndarray) -> BlockPictures:
    """Return what the page shows of a block; without a grid, these are only the norms."""
    norms = patch_norms(context.tokens, context.prefix).cpu()
    if context.grid is None:
        return BlockPictures(context.block, norms, None, {}, {})
    kinds = {"teacher": context.tokens[torch.from_numpy(chosen)]}
    if refiner is not None:
        kinds["refined"] = refiner.clean(kinds["teacher"], context.block)
    rows, columns = context.grid
    marked = (rows // 2) * columns + columns // 2
    patches = {name: x[:, context.prefix :].cpu() for name, x in kinds.items()}
    return BlockPictures(
        context.block,
        norms,
        artifact_map(context).cpu(),
        {name: x.norm(dim=-1).unflatten(1, context.grid) for name, x in patches.items()},
        {name: cosine_to(x, torch.full((len(x),), marked)).unflatten(1, context.grid) for name, x in patches.items()},
    )


def _views(cache: Cache, records: np.ndarray, images: Spec | None) -> np.ndarray | None:
    """Return the views (n, height, width, 3) of records, for pictures; None if the images are not found."""
    size = Size.of(cache.manifest.teacher.image_size).within(_PIXELS)
    try:
        with open_images(cache, images) as files:
            return cache.pixels(records, size, files).numpy()
    except UserError as error:
        say(f"the page has no images: {error}")
        return None
