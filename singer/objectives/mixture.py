"""Several objectives at once."""

from collections.abc import Mapping

from torch import Tensor, nn

from singer.objectives.base import Objective


class Mixture(nn.Module):
    """A weighted sum: each objective counts with its weight times the mean of its parts."""

    def __init__(self, objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)

    def reads(self) -> dict[bool, tuple[int, ...]]:
        """{whether in the teacher's units: the blocks that are compared so}"""
        found: dict[bool, set[int]] = {}
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            found.setdefault(bool(objective.in_teacher_units), set()).update(objective.reads())
        return {kind: tuple(sorted(blocks)) for kind, blocks in sorted(found.items())}

    def forward(
        self,
        student: Mapping[bool, Mapping[int, Tensor]],
        targets: Mapping[bool, Mapping[int, Tensor]],
        labels: Tensor | None,
    ) -> dict[str, Tensor]:
        """Tokens of both kinds, by whether they are in the teacher's units -> {"objective.part": weighted (B,)}."""
        losses: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            kind = bool(objective.in_teacher_units)
            parts = objective(student[kind], targets[kind], labels)
            losses |= {f"{name}.{part}": self.weights[name] / len(parts) * loss for part, loss in parts.items()}
        return losses
