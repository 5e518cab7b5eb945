"""What maps a student's tokens to its teacher's, by name. A new projector is one file and one line here."""

from singer.projectors.base import Projection, Projector, Projectors, ProjectorSpec
from singer.projectors.ladder import Ladder
from singer.projectors.linear import Linear
from singer.projectors.mlp import MlpHead
from singer.projectors.review import Review
from singer.projectors.unprojected import Unprojected

PROJECTORS: dict[str, type[Projection]] = {
    "linear": Linear,
    "mlp": MlpHead,
    "ladder": Ladder,
    "review": Review,
    "none": Unprojected,
}

__all__ = ["PROJECTORS", "Ladder", "Projection", "Projector", "ProjectorSpec", "Projectors", "Review"]
