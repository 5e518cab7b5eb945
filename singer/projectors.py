"""From a student block's tokens (B, P + N, d) to the teacher's width, or its grid too. A new one is a registry line."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from singer.matching import resize_tokens


@dataclass(frozen=True)
class ProjectorSpec:
    """What a projector joins: widths, and grids (rows, columns) of the patches, of a student block and its teacher.

    prefix: tokens ahead of the patches on both sides, 0 or CLS.
    """

    width: int
    grid: tuple[int, int]
    target_width: int
    target_grid: tuple[int, int]
    prefix: int


class Linear(nn.Linear):
    """Every token by itself."""

    # Whether tokens come out on the teacher's grid.
    lifts = False

    def __init__(self, ends: ProjectorSpec) -> None:
        super().__init__(ends.width, ends.target_width)


class Mlp(nn.Sequential):
    """Every token by itself, through one hidden layer as wide as the wider of both."""

    lifts = False

    def __init__(self, ends: ProjectorSpec) -> None:
        hidden = max(ends.width, ends.target_width)
        super().__init__(nn.Linear(ends.width, hidden), nn.GELU(), nn.Linear(hidden, ends.target_width))


class Lift(nn.Module):
    """Patches are mixed over positions by a learned matrix (N_t, N_s), the same for all channels; then `Linear`.

    It begins as bilinear interpolation of the grid, which on equal grids is the identity. Prefix tokens are not mixed.
    """

    lifts = True

    def __init__(self, ends: ProjectorSpec) -> None:
        super().__init__()
        self.prefix = ends.prefix
        # One-hot patches, a channel for each position, interpolated: how much of it each new position gets.
        positions = torch.eye(ends.grid[0] * ends.grid[1])
        self.mixing = nn.Parameter(resize_tokens(positions[None], 0, ends.grid, ends.target_grid)[0].clone())
        self.linear = Linear(ends)

    def forward(self, tokens: Tensor) -> Tensor:
        lifted = torch.cat([tokens[:, : self.prefix], self.mixing @ tokens[:, self.prefix :]], dim=1)
        projected: Tensor = self.linear(lifted)
        return projected


PROJECTORS: dict[str, type[Linear | Mlp | Lift]] = {"linear": Linear, "mlp": Mlp, "lift": Lift}
