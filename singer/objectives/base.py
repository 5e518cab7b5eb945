"""What an objective is and what it may know."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """Where student and teacher tokens meet: the matched teacher blocks, their width, prefix tokens (0 or CLS), grid.

    grid: (rows, columns) of the patch tokens; None where only some patches of each image are stored.
    """

    blocks: tuple[int, ...]
    width: int
    prefix: int
    grid: tuple[int, int] | None


class Objective(nn.Module):
    """(student tokens, targets), both {teacher block: (B, N, d)} -> {block: losses (B,)}, one a record.

    The student's tokens are already projected to the teacher's width. Parameters of an objective are trained with the
    student; whatever it draws comes from torch's global generator, as dropout's.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    def forward(self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {b: self.block_loss(student[b], target, b) for b, target in targets.items()}

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Losses (B,) of one block's tokens (B, N, d)."""
        raise NotImplementedError
