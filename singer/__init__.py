"""The method, in pure torch: no file, process, clock or global random state is touched here.

Shapes used throughout: B images, N tokens (prefix tokens first, then patches in row-major order), P prefix
tokens (CLS and registers), d channels, r adapter rank. Block numbers are 0-based.
"""

from singer.artifacts import robust_threshold
from singer.matching import match_blocks, resize_tokens
from singer.objectives import OBJECTIVES
from singer.refiner import CLEANERS, NORMALISERS, Refiner
from singer.tail import TeacherTail
from singer.vit import block_outputs

__all__ = [
    "CLEANERS",
    "NORMALISERS",
    "OBJECTIVES",
    "Refiner",
    "TeacherTail",
    "block_outputs",
    "match_blocks",
    "resize_tokens",
    "robust_threshold",
]
