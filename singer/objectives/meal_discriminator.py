"""MEAL V2 (arXiv 2009.08453) with its discriminator of the student's class probabilities and the teachers'.

In the authors' code the student lowers the discriminator's loss too, and so helps it. Here it raises that loss, as the
paper says: the gradient is reversed between the two (arXiv 1409.7495), and both are trained in one step.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singer.objectives.base import ObjectiveContext
from singer.objectives.meal import Meal

# The authors' widths are classes / 8 and classes / 64, which few classes would make too narrow to learn anything.
_RATIO, _LEAST = 8, 8


class MealDiscriminator(Meal):
    """The objective meal, and the binary cross-entropy of three linear maps that tell whose probabilities they read."""

    name = "meal-discriminator"

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        classes = int(self.suffix.model.num_classes)
        wide, narrow = (max(_LEAST, classes // ratio) for ratio in (_RATIO, _RATIO**2))
        self.discriminator = nn.Sequential(
            nn.Linear(classes, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1)
        )

    def parts(self, ours: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Return {"kl", "discriminator": losses (B,)}; the latter in training only: it says nothing of a student."""
        found = super().parts(ours, mean)
        if not self.training:
            return found
        reverse = 2 * ours.detach() - ours  # the same numbers, and the opposite gradient
        own, teachers = self.discriminator(torch.stack([reverse, mean.detach()])).squeeze(-1)
        return found | {"discriminator": 0.5 * (F.softplus(own) + F.softplus(-teachers))}
