"""Patch tokens of one view of an image, brought to the places of another view where both show the same.

What a teacher adds at a place of its grid is somewhere else in another view, so that a student cannot learn it from
there (the shift-equivariant loss of C-RADIOv4, arXiv 2601.17237), and it fades in the mean over views (DVT, arXiv
2401.02957; PH-Reg, arXiv 2505.21501).
"""

import torch
from torch import Tensor


def average_overlap(tokens: Tensor, prefix: int, grid: tuple[int, int], places: Tensor) -> Tensor:
    """Average the patches of each first view over all views that show their places: (B, P + rows · columns, d).

    tokens: (V · B, the same, d), those of the first view of each image, then those of the second, and so on; prefix:
    P, how many of them have no place, and stay those of the first view; grid: (rows, columns); places: (B, V, 5), as in
    resample_overlap. The first view shows all its places: a patch that no other view shows stays as it is.
    """
    own, *others = tokens.chunk(places.shape[1])
    patches = own[:, prefix:]
    count = torch.ones_like(patches[..., :1])
    for other, place in zip(others, places.unbind(1)[1:], strict=True):
        moved, shown = resample_overlap(other[:, prefix:], grid, torch.stack([places[:, 0], place], 1), grid)
        seen = shown.unsqueeze(-1).to(patches.dtype)
        patches, count = patches + moved * seen, count + seen
    return torch.cat([own[:, :prefix], patches / count], 1)


def resample_overlap(
    patches: Tensor, grid: tuple[int, int], places: Tensor, target: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Bring patches to the grid of another view: (B, rows · columns, d), and which of them are shown, (B, the same).

    patches: (B, P, d) on their grid (rows, columns), of the second view of `places`; places: (B, 2, 5), of both views:
    left, upper, right and lower edge as shares of the image, and 1 where a view is mirrored; target: (rows, columns) of
    the first view. A patch is shown if its centre is in both views. Interpolation is bilinear, and over as many patches
    as one patch of the first view covers, as in tokens.resize_tokens.
    """
    own, other = places.float().unbind(1)
    columns, seen = _axis(own[:, 0:3:2], own[:, 4], target[1], other[:, 0:3:2], other[:, 4], grid[1])
    upright = torch.zeros_like(own[:, 4])
    rows, above = _axis(own[:, 1:4:2], upright, target[0], other[:, 1:4:2], upright, grid[0])
    moved = torch.einsum("brx,bxyd->bryd", rows, patches.unflatten(1, grid))
    moved = torch.einsum("bcy,bryd->brcd", columns, moved)
    return moved.flatten(1, 2), (above[:, :, None] & seen[:, None]).flatten(1)


def _axis(
    own: Tensor, mirrored: Tensor, count: int, other: Tensor, other_mirrored: Tensor, others: int
) -> tuple[Tensor, Tensor]:
    """Return along one axis the weights of the other view's patches, (B, count, others), and what is shown, (B, count).

    own, other: (B, 2), the edges of the views; mirrored, other_mirrored: (B,); count, others: patches of the views.
    """
    length, reach = own[:, 1:] - own[:, :1], other[:, 1:] - other[:, :1]
    share = (torch.arange(count, device=own.device) + 0.5).expand(len(own), -1) / count
    share = torch.where(mirrored[:, None] > 0, 1 - share, share)
    place = (own[:, :1] + share * length - other[:, :1]) / reach
    shown = (place >= 0) & (place <= 1)
    place = torch.where(other_mirrored[:, None] > 0, 1 - place, place).clamp(0, 1) * others - 0.5
    width = (length / count * others / reach).clamp_min(1)
    distance = (place[:, :, None] - torch.arange(others, device=own.device)).abs()
    weights = (1 - distance / width[:, :, None]).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True), shown
