"""What a student minimises, by name. A new objective is one file and one line here."""

from singer.objectives.base import Objective, ObjectiveContext, Tokens
from singer.objectives.cosine import Cosine
from singer.objectives.gram import Gram
from singer.objectives.labels import Labels
from singer.objectives.logits import Logits
from singer.objectives.mixture import Mixture
from singer.objectives.mse import Mse
from singer.objectives.relation import Relation
from singer.objectives.smooth_l1 import SmoothL1
from singer.objectives.theia import Theia
from singer.objectives.unic import Unic
from singer.objectives.vitkd import VitKd

OBJECTIVES: dict[str, type[Objective]] = {
    "mse": Mse,
    "cosine": Cosine,
    "gram": Gram,
    "labels": Labels,
    "logits": Logits,
    "relation": Relation,
    "smooth-l1": SmoothL1,
    "theia": Theia,
    "unic": Unic,
    "vitkd": VitKd,
}

__all__ = ["OBJECTIVES", "Mixture", "Objective", "ObjectiveContext", "Tokens"]
