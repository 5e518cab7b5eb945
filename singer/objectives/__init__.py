"""What a student minimises, by name. A new objective is one file and one line here."""

from singer.objectives.acam import Acam
from singer.objectives.angle import Angle
from singer.objectives.base import Objective, ObjectiveContext, Tokens
from singer.objectives.cosine import Cosine
from singer.objectives.gram import Gram
from singer.objectives.js import Js
from singer.objectives.labels import Labels
from singer.objectives.logits import Logits
from singer.objectives.meal import Meal
from singer.objectives.meal_discriminator import MealDiscriminator
from singer.objectives.minilm import MiniLm, TinyMim
from singer.objectives.mixture import Mixture
from singer.objectives.mse import Mse
from singer.objectives.proteus import Proteus
from singer.objectives.prototypes import Prototypes
from singer.objectives.queue import Queue
from singer.objectives.relation import Relation
from singer.objectives.smooth_l1 import SmoothL1
from singer.objectives.theia import Theia
from singer.objectives.top_logits import TopLogits
from singer.objectives.unic import Unic
from singer.objectives.vitkd import VitKd
from singer.objectives.weighted import Weighted
from singer.objectives.zero_shot import ZeroShot

OBJECTIVES: dict[str, type[Objective]] = {
    "mse": Mse,
    "acam": Acam,
    "angle": Angle,
    "cosine": Cosine,
    "gram": Gram,
    "js": Js,
    "labels": Labels,
    "logits": Logits,
    "meal": Meal,
    "meal-discriminator": MealDiscriminator,
    "minilm": MiniLm,
    "prototypes": Prototypes,
    "proteus": Proteus,
    "queue": Queue,
    "relation": Relation,
    "smooth-l1": SmoothL1,
    "theia": Theia,
    "tinymim": TinyMim,
    "top-logits": TopLogits,
    "unic": Unic,
    "vitkd": VitKd,
    "weighted": Weighted,
    "zero-shot": ZeroShot,
}

__all__ = ["OBJECTIVES", "Mixture", "Objective", "ObjectiveContext", "Tokens"]
