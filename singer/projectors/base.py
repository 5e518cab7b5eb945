"""What a projector is."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorSpec:
    """The ends of a projector.

    widths: of the student's tokens that it reads, in channels, the matched block last; target: width of the teacher's
    tokens; prefix: number of tokens before the patches, 0 or CLS.
    """

    widths: tuple[int, ...]
    target: int
    prefix: int


class Projector(nn.Module):
    """Map tokens of the student, each (B, N, d), to the teacher's width (B, N, target).

    reads_all: it reads all of the student's blocks up to the matched one, in their order; others read only that one.
    """

    reads_all = False

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()

    def forward(self, *tokens: Tensor) -> Tensor:
        """Return the projected tokens (B, N, target)."""
        raise NotImplementedError
