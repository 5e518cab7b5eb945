"""No projector, for students that are as wide as their teacher, such as a copy of it that is trained on."""

from torch import Tensor

from singer.errors import UserError
from singer.projectors.base import Projector, ProjectorSpec


class Unprojected(Projector):
    """Compare tokens as they are. Raises UserError if the two widths differ."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__(spec)
        if spec.widths[-1] != spec.target:
            raise UserError(
                f"distill.projector none compares tokens as they are, and the student has {spec.widths[-1]} channels "
                f"where its teacher has {spec.target}; take another one (--set distill.projector=linear)"
            )

    def forward(self, *tokens: Tensor) -> Tensor:
        """Return the tokens of the matched block."""
        return tokens[-1]
