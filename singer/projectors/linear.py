"""The linear projector of FitNet (arXiv 1412.6550) and SiNGER."""

from torch import Tensor, nn
from torch.nn import functional as F

from singer.projectors.base import Projector, ProjectorSpec


class Linear(Projector):
    """One linear map with a bias."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__(spec)
        layer = nn.Linear(spec.widths[-1], spec.target)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, *tokens: Tensor) -> Tensor:
        """Project the tokens of the matched block."""
        return F.linear(tokens[-1], self.weight, self.bias)
