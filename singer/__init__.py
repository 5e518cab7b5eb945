"""The method, in pure torch: no file, process or clock is touched here.

Shapes used throughout: B images, N tokens (prefix tokens first, then patches in row-major order), P prefix
tokens (CLS and registers), d channels, r adapter rank. Block numbers are 0-based.
"""

from singer.artifacts import BlockScale, robust_threshold
from singer.backbones import block_outputs
from singer.cleaners import CLEANERS, Shape
from singer.evidence import Evidence
from singer.matching import match_blocks, resize_tokens
from singer.normalisers import NORMALISERS
from singer.objectives import OBJECTIVES
from singer.refiner import Refiner
from singer.subspaces import BASES
from singer.tail import TeacherTail

__all__ = [
    "BASES",
    "CLEANERS",
    "NORMALISERS",
    "OBJECTIVES",
    "BlockScale",
    "Evidence",
    "Refiner",
    "Shape",
    "TeacherTail",
    "block_outputs",
    "match_blocks",
    "resize_tokens",
    "robust_threshold",
]
