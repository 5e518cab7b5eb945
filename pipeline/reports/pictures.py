"""Rows of small pictures in which a patch is a pixel: norms, similarities, principal components."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.reports.measurements import Measurement
from singer.maps import cosine_to, principal_scores, turn_towards
from singer.sizes import Size

NORMS, COSINES = "magma", "viridis"
# Norms beyond this many medians have the same colour.
MOST_MEDIANS = 5.0
# So many standard deviations of a component extend from black to full colour.
_SPAN = 4.0
_STOPS = 9
_PHOTO = 192

# A position as shares of height and width.
Place = tuple[float, float]
# A measurement that has maps, its patches (n, P, d) and their grid.
_Whole = tuple[Measurement, Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Mark:
    """The frame of a patch, in percent of the picture's sides."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Strip:
    """A model's pictures, as data URLs, one for each image.

    size: the size of the pictures in patches, or "" for photographs; marks: one for each picture, or none.
    """

    title: str
    size: str
    pictures: list[str]
    marks: list[Mark]


def choose_places(measurements: Sequence[Measurement]) -> list[Place]:
    """Return the place to mark in each image: the patch in its middle that is least similar to its mean patch.

    The features are those of the reference, see `pca_strips`. The result is empty if no model has maps.
    """
    able = _with_grids(measurements)
    if not able:
        return []
    _, patches, (rows, columns) = _reference(able)
    likeness = F.cosine_similarity(patches, patches.mean(1, keepdim=True), dim=-1).unflatten(1, (rows, columns))
    top, left = rows // 4, columns // 4
    middle = likeness[:, top : rows - top, left : columns - left]
    places = []
    for number in middle.flatten(1).argmin(1).tolist():
        row, column = divmod(number, middle.shape[2])
        places.append(((top + row + 0.5) / rows, (left + column + 0.5) / columns))
    return places


def photos(images: np.ndarray, grid: tuple[int, int], places: Sequence[Place] = ()) -> Strip:
    """Return the strip of the images (n, height, width, 3) uint8, with the patch of the grid marked at each place."""
    pictures = [_url(Image.fromarray(image), "JPEG") for image in images]
    return Strip("image", "", pictures, [_mark(grid, place) for place in places])


def norm_strips(measurements: Sequence[Measurement]) -> list[Strip]:
    """Draw patch norms in units of each model's median over all measured images."""
    strips = []
    for measurement, patches, grid in _with_grids(measurements):
        maps = patches.norm(dim=-1) / measurement.norms[measurement.block].median()
        strips.append(_coloured(measurement, maps / MOST_MEDIANS, grid, NORMS, []))
    return strips


def cosine_strips(measurements: Sequence[Measurement], places: Sequence[Place]) -> list[Strip]:
    """Draw the cosine similarity, from 0 to 1, of every patch to the patch at the marked place of its image."""
    strips = []
    for measurement, patches, grid in _with_grids(measurements):
        marked = torch.tensor([_patch_at(grid, place) for place in places])
        marks = [_mark(grid, place) for place in places]
        strips.append(_coloured(measurement, cosine_to(patches, marked), grid, COSINES, marks))
    return strips


def pca_strips(measurements: Sequence[Measurement]) -> list[Strip]:
    """Draw each model's own principal components as red, green and blue, turned to be most like the reference's.

    The reference is the first refined teacher, or else the teacher, or else the first student.
    """
    able = _with_grids(measurements)
    if not able:
        return []
    _, patches, target_grid = _reference(able)
    target = principal_scores(patches)
    strips = []
    for measurement, patches, grid in able:
        scores = turn_towards(principal_scores(patches), grid, target, target_grid)
        pixels = (255 * (0.5 + scores / _SPAN).clamp(0, 1)).round().to(torch.uint8).unflatten(1, grid).numpy()
        urls = [_url(Image.fromarray(image), "PNG") for image in pixels]
        strips.append(Strip(measurement.title, _size(grid), urls, []))
    return strips


def gradient(colours: str) -> str:
    """Return a colour map as the stops of a CSS gradient."""
    return ", ".join(mpl.colors.to_hex(c) for c in mpl.colormaps[colours](np.linspace(0, 1, _STOPS)))


def _with_grids(measurements: Sequence[Measurement]) -> list[_Whole]:
    return [(x, x.patches, x.grid) for x in measurements if x.patches is not None and x.grid is not None]


def _reference(able: Sequence[_Whole]) -> _Whole:
    order = {"refined": 0, "teacher": 1, "student": 2}
    return min(able, key=lambda whole: order[whole[0].kind])


def _coloured(measurement: Measurement, maps: Tensor, grid: tuple[int, int], colours: str, marks: list[Mark]) -> Strip:
    """Draw maps (n, P) of values from 0 to 1."""
    pixels = mpl.colormaps[colours](maps.unflatten(1, grid).clamp(0, 1).numpy(), bytes=True)[..., :3]
    pictures = [_url(Image.fromarray(np.ascontiguousarray(image)), "PNG") for image in pixels]
    return Strip(measurement.title, _size(grid), pictures, marks)


def _patch_at(grid: tuple[int, int], place: Place) -> int:
    """Return the number of the patch at a place."""
    rows, columns = grid
    return int(place[0] * rows) * columns + int(place[1] * columns)


def _mark(grid: tuple[int, int], place: Place) -> Mark:
    rows, columns = grid
    row, column = divmod(_patch_at(grid, place), columns)
    return Mark(100 * column / columns, 100 * row / rows, 100 / columns, 100 / rows)


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}"


def _url(image: Image.Image, kind: str) -> str:
    if max(image.size) > _PHOTO:
        image = image.resize(Size(*image.size).within(_PHOTO), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
