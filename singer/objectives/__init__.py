"""What a student minimises, by name. A new objective is one file and one line here."""

from singer.objectives.base import Objective, Setting
from singer.objectives.cosine import Cosine
from singer.objectives.mse import Mse
from singer.objectives.vitkd import VitKd

OBJECTIVES: dict[str, type[Objective]] = {"mse": Mse, "cosine": Cosine, "vitkd": VitKd}

__all__ = ["OBJECTIVES", "Objective", "Setting"]
