"""Features averaged over copies of a view that are shifted by whole patches and mirrored, after PH-Reg.

What a teacher adds at a place of its grid, whatever is seen there, stays where it is when the image is shifted, so that
the average has less of it (Chen et al., arXiv 2505.21501). A copy shows nothing that the view does not show: beyond the
view's edge it goes on as in a mirror, and tokens of this margin count for nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singer.errors import UserError
from singer.sizes import ImageSize, Size

# The largest shift in percent of the side, and the number of random shifts from which some are chosen (PH-Reg).
_PERCENT, _POOL = 15, 100


@dataclass(frozen=True)
class Copying:
    """How the copies of a view are made.

    count: how many, of which the first is the view itself; unit: of the shifts, in pixels, a whole number of patches of
    every block; most: the largest shift down or up, and to a side, in units.
    """

    count: int
    unit: Size
    most: Size

    @classmethod
    def of(cls, count: int, image_size: ImageSize, grids: Sequence[tuple[int, int]]) -> "Copying":
        """Return how a teacher's views are copied. grids: (rows, columns) of the patch tokens of each block.

        Raises UserError if patches do not divide the image, or if a shift by one of them would be too large.
        """
        size = Size.of(image_size)
        for grid in grids:
            if size.height % grid[0] or size.width % grid[1]:
                raise UserError(
                    f"teacher.copies: {Size(*grid)} patches do not divide an image of {size} pixels; take a "
                    "teacher.image_size that is a multiple of the largest patch, or set teacher.copies=1"
                )
        unit = Size(*(math.lcm(*(size[axis] // grid[axis] for grid in grids)) for axis in (0, 1)))
        most = Size(*(_PERCENT * (side // step) // 100 for side, step in zip(size, unit, strict=True)))
        if not any(most):
            least = Size(*(-(-100 // _PERCENT) * step for step in unit))
            raise UserError(
                f"teacher.copies: copies are shifted by at most {_PERCENT} % of the side, and in an image of {size} a "
                f"patch of {unit} pixels is more; take a teacher.image_size of {least} or more, or set teacher.copies=1"
            )
        return cls(count, unit, most)

    @property
    def numbers(self) -> int:
        """Return how many uniform numbers `choose` takes."""
        return 2 * _POOL + self.count

    def choose(self, uniform: np.ndarray) -> np.ndarray:
        """Choose copies, (count, 3) int16: shifts down and to the right, in units, and 1 where a copy is mirrored.

        uniform: (numbers,) of uniform numbers. Each shift is the one of a random pool that is farthest from all that
        were taken before it, of which the first is none; once all were taken, they are taken again in this order.
        Every copy but the first is mirrored with probability 1/2.
        """
        most = np.array(self.most)
        pool = np.floor(uniform[: 2 * _POOL].reshape(_POOL, 2) * (2 * most + 1)).astype(np.int64) - most
        shifts = [np.zeros(2, np.int64)]
        nearest = anew = np.square(pool).sum(1)
        while len(shifts) < self.count:
            nearest = nearest if nearest.any() else anew
            shifts.append(pool[int(nearest.argmax())])
            nearest = np.minimum(nearest, np.square(pool - shifts[-1]).sum(1))
        mirrored = uniform[2 * _POOL :] < 0.5
        mirrored[0] = False
        return np.column_stack([np.stack(shifts), mirrored]).astype(np.int16)

    def average(
        self,
        outputs: Callable[[Tensor], Mapping[int, Tensor]],
        images: Tensor,
        copies: Tensor,
        prefix: int,
        grids: Mapping[int, tuple[int, int]],
    ) -> dict[int, Tensor]:
        """Return {block: features (n, P + patches, d) float32} of images (n, 3, H, W), averaged over their copies.

        outputs: the teacher, images -> {block: features}; copies: (n, count, 3) as `choose` gives them; prefix: P, the
        tokens before the patches; grids: {block: (rows, columns)}. Prefix tokens are averaged over all copies, and each
        patch over the copies that show it, of which the view is one.
        """
        size, sums, counts = images.shape[-2:], dict[int, Tensor](), dict[int, Tensor]()
        for copy in copies.to(images.device).long().unbind(1):
            for block, x in outputs(copied(images, copy, self.unit)).items():
                # Shifts in cells of the block's grid: patches of earlier blocks may be smaller.
                cells = [step * n // side for step, n, side in zip(self.unit, grids[block], size, strict=True)]
                place = copy.to(x.device) * torch.tensor([*cells, 1], device=x.device)
                tokens, shown = realigned(x.float(), prefix, grids[block], place)
                sums[block], counts[block] = sums.get(block, 0) + tokens, counts.get(block, 0) + shown
        return {block: x / counts[block].unsqueeze(-1) for block, x in sums.items()}


def copied(images: Tensor, copy: Tensor, unit: Size) -> Tensor:
    """Return a copy of each image, (n, 3, H, W), continued as in a mirror beyond its edges.

    copy: (n, 3), see Copying.choose; unit: of the shifts, in pixels. Place (y, x) of a copy that is shifted by (a, b)
    shows place (y + a, x + b); then it is mirrored.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) + copy[:, :1] * unit.height
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(copy[:, 2:] > 0, width - 1 - columns, columns) + copy[:, 1:2] * unit.width
    rows, columns = (last - (last - at.abs()).abs() for at, last in ((rows, height - 1), (columns, width - 1)))
    every = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices around a slice bring the channels to the end.
    return images[every, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


def realigned(tokens: Tensor, prefix: int, grid: tuple[int, int], copy: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the tokens of copies to their places in the views: (n, N, d), and whether each was shown, (n, N) float32.

    tokens: (n, N, d), of which the first `prefix` have no place; copy: (n, 3), see Copying.choose, with shifts in cells
    of the grid (rows, columns). Tokens that were not shown are 0.
    """
    high, wide = grid
    rows = torch.arange(high, device=tokens.device) - copy[:, :1]
    columns = torch.arange(wide, device=tokens.device) - copy[:, 1:2]
    inside = ((rows >= 0) & (rows < high))[:, :, None] & ((columns >= 0) & (columns < wide))[:, None]
    columns = torch.where(copy[:, 2:] > 0, wide - 1 - columns, columns)
    at = rows.clamp(0, high - 1)[:, :, None] * wide + columns.clamp(0, wide - 1)[:, None]
    moved = tokens[:, prefix:].gather(1, at.flatten(1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    shown = torch.cat([inside.new_ones(len(tokens), prefix), inside.flatten(1)], dim=1).to(tokens.dtype)
    return torch.cat([tokens[:, :prefix], moved], dim=1) * shown.unsqueeze(-1), shown
