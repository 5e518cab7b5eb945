"""C-RADIOv4's loss of summaries (arXiv 2601.17237): angles in units of each teacher's own spread.

The summaries of some teachers fill a narrow cone and those of others a wide one; without the division, the wide one
would decide what a student of several teachers learns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.all_processes import mean_of_all
from singer.objectives.base import LastBlock, ObjectiveContext

# The cosine stays so far from 1, where the angle has no slope, and the squared angle above this.
_EDGE = 1e-6
_SMALLEST = 2 * _EDGE


class Angle(LastBlock):
    """Squared angle between the student's CLS and the teacher's (without CLS, mean patches), over its dispersion.

    The dispersion is the mean squared angle of the teacher's summaries from their mean direction. Both are running
    means. Only the last matched block is compared.
    """

    momentum = 0.99

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.register_buffer("direction", torch.zeros(context.width))
        self.register_buffer("dispersion", torch.zeros(()))

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"summary": losses (B,)}. In training, the teacher's mean and dispersion move."""
        ours, theirs = (self.summary(x.float()) for x in (student, target))
        if self.training:
            self.move(theirs)
        spread: Tensor = self.dispersion.clone()  # type: ignore[operator]
        return {"summary": squared_angle(ours, theirs) / torch.where(spread > 0, spread, 1.0)}

    def summary(self, tokens: Tensor) -> Tensor:
        """Return the directions (B, d) of CLS, or of the mean patch where there is none."""
        return F.normalize(tokens[:, 0] if self.context.prefix else tokens.mean(1), dim=-1)

    @torch.no_grad()
    def move(self, summaries: Tensor) -> None:
        """Move the mean direction and the dispersion towards those of summaries (B, d); the first batch sets them."""
        self.update("direction", mean_of_all(summaries.mean(0)))
        spread = mean_of_all(self.mean_squared_angle(summaries))
        # The angle of a lone first summary from itself says nothing.
        self.update("dispersion", torch.where(spread > 2 * _SMALLEST, spread, self.dispersion))  # type: ignore[arg-type]

    def update(self, name: str, value: Tensor) -> None:
        """Move a running mean towards a value; while it is zero, the value takes its place."""
        old: Tensor = getattr(self, name)
        old.copy_(torch.where(old.any(), self.momentum * old + (1 - self.momentum) * value, value))

    def mean_squared_angle(self, summaries: Tensor) -> Tensor:
        """Return the mean squared angle, a scalar, of summaries (B, d) from the mean direction."""
        return squared_angle(summaries, F.normalize(self.direction, dim=-1)).mean()  # type: ignore[arg-type]


def squared_angle(a: Tensor, b: Tensor) -> Tensor:
    """Compute the squared angle (B,), in radians, between unit vectors (B, d); where they are equal, it has a slope."""
    return (a * b).sum(-1).clamp(-1 + _EDGE, 1 - _EDGE).acos().square()
