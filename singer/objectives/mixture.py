"""Several objectives at once."""

from collections.abc import Mapping

from torch import Tensor, nn

from singer.objectives.base import Objective, Tokens


class Mixture(nn.Module):
    """A weighted sum of objectives: each counts with its weight times the mean of its parts."""

    def __init__(self, objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)

    def reads(self, in_teacher_units: bool) -> tuple[int, ...]:
        """List the blocks that are compared in the teacher's units, or those that are compared normalised."""
        blocks: set[int] = set()
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            if objective.in_teacher_units == in_teacher_units:
                blocks.update(objective.reads())
        return tuple(sorted(blocks))

    def forward(self, student: Tokens, targets: Tokens, labels: Tensor | None) -> dict[str, Tensor]:
        """Compare tokens on the scale of each objective; return {"objective.part": weighted losses (B,)}."""
        losses: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            if objective.in_teacher_units:
                parts = objective(student.cleaned, targets.cleaned, labels)
            else:
                parts = objective(student.normalised, targets.normalised, labels)
            losses |= {f"{name}.{part}": self.weights[name] / len(parts) * loss for part, loss in parts.items()}
        return losses
