"""What maps a student's tokens to its teacher's, by name. A new projector is one file and one line here."""

from singer.projectors.base import Projector, ProjectorSpec
from singer.projectors.ladder import Ladder
from singer.projectors.linear import Linear
from singer.projectors.mlp import MlpHead

PROJECTORS: dict[str, type[Projector]] = {
    "linear": Linear,
    "mlp": MlpHead,
    "ladder": Ladder,
}

__all__ = ["PROJECTORS", "Projector", "ProjectorSpec"]
