"""Several objectives at once."""

from collections.abc import Mapping

from torch import Tensor, nn

from singer.objectives.base import Objective, Tokens


class Mixture(nn.Module):
    """A weighted sum of objectives: each counts with its weight times the mean of its parts.

    block_weights: {block: weight} in this mean, for parts that are blocks; default: equal.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, float],
        block_weights: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)
        self.block_weights = {str(b): w for b, w in (block_weights or {}).items()}

    def reads(self, in_teacher_units: bool) -> tuple[int, ...]:
        """List the blocks that are compared in the teacher's units, or those that are compared normalised."""
        blocks: set[int] = set()
        for objective in self._each():
            if not objective.own_attention and objective.in_teacher_units == in_teacher_units:
                blocks.update(objective.reads())
        return tuple(sorted(blocks))

    def attends(self) -> tuple[int, ...]:
        """List the blocks whose relations are compared with those of the student's own attention."""
        return tuple(sorted({b for objective in self._each() if objective.own_attention for b in objective.reads()}))

    def soft_targets(self, targets: Tokens) -> dict[str, Tensor]:
        """Return {objective: what it averages over the teachers}, of one teacher; others are left out."""
        found = {n: self._get(n).soft_targets(targets.cleaned) for n in self.objectives}
        return {name: x for name, x in found.items() if x is not None}

    def forward(
        self, student: Tokens, targets: Tokens, labels: Tensor | None, means: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compare tokens on the scale of each objective; return {"objective.part": weighted losses (B,)}.

        means: {objective: mean of the teachers' soft targets}.
        """
        losses: dict[str, Tensor] = {}
        for name in self.objectives:
            objective = self._get(name)
            if means and name in means:
                parts = objective.loss_to_mean(student.cleaned, means[name])
            elif objective.own_attention:
                parts = objective(student.attention, targets.cleaned, labels)
            elif objective.in_teacher_units:
                parts = objective(student.cleaned, targets.cleaned, labels)
            else:
                parts = objective(student.normalised, targets.normalised, labels)
            # The factors of the parts add up to the objective's weight.
            blocks = bool(self.block_weights) and all(part in self.block_weights for part in parts)
            own = {part: self.block_weights[part] if blocks else 1.0 for part in parts}
            unit = self.weights[name] / sum(own.values())
            losses |= {f"{name}.{part}": own[part] * unit * loss for part, loss in parts.items()}
        return losses

    def _each(self) -> list[Objective]:
        return [self._get(name) for name in self.objectives]

    def _get(self, name: str) -> Objective:
        objective = self.objectives[name]
        assert isinstance(objective, Objective)
        return objective
