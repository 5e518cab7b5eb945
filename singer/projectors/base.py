"""What a projector is."""

from collections.abc import Mapping, Sequence
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


class Projection(nn.Module):
    """How the student's tokens come to the teacher's width, at all compared blocks.

    reads_all: it reads all of the student's blocks up to a matched one, in their order; others read only that one.
    """

    reads_all = False

    @classmethod
    def of_blocks(cls, specs: Mapping[int, ProjectorSpec]) -> nn.Module:
        """Build what takes (tokens, grids) of all compared blocks of the teacher, {block: its ends}, as Projectors."""
        return cls(specs)


class Projector(Projection):
    """Map tokens of the student, each (B, N, d), to the teacher's width (B, N, target), at one block."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()

    def forward(self, *tokens: Tensor) -> Tensor:
        """Return the projected tokens (B, N, target)."""
        raise NotImplementedError

    @classmethod
    def of_blocks(cls, specs: Mapping[int, ProjectorSpec]) -> "Projectors":
        """Build a projector for each compared block of the teacher, {block: its ends}."""
        return Projectors({str(block): cls(spec) for block, spec in specs.items()})


class Projectors(nn.ModuleDict):
    """Projectors of several blocks, each for itself."""

    def forward(
        self, tokens: Mapping[int, Sequence[Tensor]], grids: Mapping[int, tuple[int, int]] | None
    ) -> dict[int, Tensor]:
        """Project the tokens that each reads, {teacher block: (B, N, d) each}; grids: see Review."""
        return {int(block): project(*tokens[int(block)]) for block, project in self.items()}
