"""MEAL V2 (arXiv 2009.08453): one student for the mean class probabilities of several teachers.

The discriminator, which tells the student's probabilities from the teachers', is in meal_discriminator.
"""

from collections.abc import Mapping

from torch import Tensor

from singer.objectives.logits import Logits


class Meal(Logits):
    """KL of the student's class probabilities from the mean of all teachers', by their weights.

    Each teacher's head reads the student's tokens. With one teacher it is the objective logits.
    """

    name = "meal"

    def forward(
        self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {part: losses (B,)} of this teacher alone."""
        return self.loss_to_mean(student, self.soft_targets(targets))

    def soft_targets(self, targets: Mapping[int, Tensor]) -> Tensor:
        """Return the teacher's class probabilities (B, classes)."""
        return self.log_probs(targets[self.block]).exp()

    def loss_to_mean(self, student: Mapping[int, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """Return {part: losses (B,)} from the mean probabilities (B, classes)."""
        return self.parts(self.log_probs(student[self.block]), mean.clamp_min(1e-30).log())

    def parts(self, ours: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Return {"kl": losses (B,)} of log probabilities (B, classes), the student's and the mean's."""
        return {"kl": (mean.exp() * (mean - ours)).sum(-1)}
