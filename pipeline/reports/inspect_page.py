"""The page of `singer inspect`: the figures of blocks, and pictures of norms, artifacts and similar patches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.cache.reader import Cache
from pipeline.reports.html import as_data_url, render, without_ticks


@dataclass(frozen=True)
class BlockPictures:
    """What is drawn of a block.

    norms: (n, patches); where: map (rows, columns) of the percentage of images with an artifact; maps: {title: patch
    norms (n, rows, columns)}; similar: {title: cosines to the middle patch (n, rows, columns)}.
    """

    block: int
    norms: Tensor
    where: Tensor | None
    maps: dict[str, Tensor]
    similar: dict[str, Tensor]


def render_inspect_page(
    cache: Cache, result: Mapping[str, Any], blocks: Sequence[BlockPictures], images: np.ndarray | None
) -> str:
    """Return the page as HTML.

    result: the fields of stages.inspect.InspectResult; images: the views (n, height, width, 3) above the maps, if any.
    """
    pictures = {"norms": _draw_norms(blocks)}
    for part in blocks:
        if part.maps:
            pictures[f"maps of block {part.block}"] = _draw_maps(part, images)
    teacher, place = cache.manifest.teacher, str(cache.place)
    return render(
        Path(__file__).with_name("inspect.html.j2"), result=result, teacher=teacher, place=place, pictures=pictures
    )


def _draw_norms(blocks: Sequence[BlockPictures]) -> str:
    """Draw box plots of patch norms by block (the paper's Figure 5), and maps of where artifacts are."""
    wheres = [part for part in blocks if part.where is not None]
    figure = Figure(figsize=(3.2 * (1 + len(wheres)), 3.2), layout="constrained")
    first, *others = np.atleast_1d(figure.subplots(1, 1 + len(wheres)))
    first.boxplot(
        [part.norms.flatten().numpy() for part in blocks],
        tick_labels=[f"block {part.block}" for part in blocks], whis=(1, 99), flierprops={"markersize": 2},
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


def _draw_maps(part: BlockPictures, images: np.ndarray | None) -> str:
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
