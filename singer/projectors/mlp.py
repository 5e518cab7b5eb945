"""The head of EUPE (arXiv 2603.22387): linear, LayerNorm, GELU, linear."""

from torch import Tensor, nn

from singer.projectors.base import Projector, ProjectorSpec

# Hidden units for each channel of the teacher; EUPE has 3,072 for 768.
_RATIO = 4


class MlpHead(Projector):
    """Two linear maps with a LayerNorm and a GELU between them."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__(spec)
        hidden = _RATIO * spec.target
        self.layers = nn.Sequential(
            nn.Linear(spec.widths[-1], hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, spec.target)
        )

    def forward(self, *tokens: Tensor) -> Tensor:
        """Project the tokens of the matched block."""
        projected: Tensor = self.layers(tokens[-1])
        return projected
