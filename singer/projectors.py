"""Projectors: tokens (B, P + N, d) of a student block -> tokens of the teacher's width, and perhaps on its grid.

A new projector is a class that takes a ProjectorSpec, and a line in the registry.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singer.matching import resize_tokens


@dataclass(frozen=True)
class ProjectorSpec:
    """Widths and patch grids (rows, columns) of a student block and its teacher block, between which a projector maps.

    prefix: number of tokens before the patches on both sides, 0 or CLS.
    """

    width: int
    grid: tuple[int, int]
    target_width: int
    target_grid: tuple[int, int]
    prefix: int


class Linear(nn.Linear):
    """A linear map of every token by itself."""

    # True if tokens come out on the teacher's grid.
    lifts = False

    def __init__(self, ends: ProjectorSpec) -> None:
        super().__init__(ends.width, ends.target_width)


class Mlp(nn.Sequential):
    """A map of every token by itself, with one hidden layer as wide as the wider side."""

    lifts = False

    def __init__(self, ends: ProjectorSpec) -> None:
        hidden = max(ends.width, ends.target_width)
        super().__init__(nn.Linear(ends.width, hidden), nn.GELU(), nn.Linear(hidden, ends.target_width))


class Lift(nn.Module):
    """A learned matrix (N_t, N_s) that mixes patches over positions, the same for all channels; then `Linear`.

    The matrix begins as bilinear interpolation of the grid, which on equal grids is the identity. Prefix tokens are not
    mixed.
    """

    lifts = True

    def __init__(self, ends: ProjectorSpec) -> None:
        super().__init__()
        self.prefix = ends.prefix
        # Interpolating one-hot patches, with a channel for each position, gives the weight of each old position in each
        # new one.
        positions = torch.eye(ends.grid[0] * ends.grid[1])
        self.mixing = nn.Parameter(resize_tokens(positions[None], 0, ends.grid, ends.target_grid)[0].clone())
        self.linear = Linear(ends)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (B, P + N_s, d) to (B, P + N_t, target width)."""
        lifted = torch.cat([tokens[:, : self.prefix], self.mixing @ tokens[:, self.prefix :]], dim=1)
        projected: Tensor = self.linear(lifted)
        return projected


PROJECTORS: dict[str, type[Linear | Mlp | Lift]] = {"linear": Linear, "mlp": Mlp, "lift": Lift}
