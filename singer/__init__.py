"""The method in pure torch: it reads no file or clock, and starts no process.

A few objectives gather what the processes of torch.distributed have, where that is initialised (all_processes.py).

Shapes used throughout: B images, N tokens (prefix tokens first, then patches in row-major order), P prefix
tokens (CLS and registers), d channels, r adapter rank. Block numbers are 0-based.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from singer.artifacts import BlockScale, robust_threshold
    from singer.backbones import block_outputs
    from singer.cleaners import CLEANERS, BlockSpec
    from singer.described import Description
    from singer.fit_context import FitContext
    from singer.matching import match_blocks
    from singer.normalisers import NORMALISERS
    from singer.objectives import OBJECTIVES
    from singer.refiner import Refiner
    from singer.subspaces import BASES
    from singer.suffix import TeacherSuffix
    from singer.tokens import resize_tokens

__all__ = [
    "BASES",
    "CLEANERS",
    "NORMALISERS",
    "OBJECTIVES",
    "BlockScale",
    "BlockSpec",
    "Description",
    "FitContext",
    "Refiner",
    "TeacherSuffix",
    "block_outputs",
    "match_blocks",
    "resize_tokens",
    "robust_threshold",
]

_MODULES = {
    "BASES": "singer.subspaces",
    "CLEANERS": "singer.cleaners",
    "NORMALISERS": "singer.normalisers",
    "OBJECTIVES": "singer.objectives",
    "BlockScale": "singer.artifacts",
    "BlockSpec": "singer.cleaners",
    "Description": "singer.described",
    "FitContext": "singer.fit_context",
    "Refiner": "singer.refiner",
    "TeacherSuffix": "singer.suffix",
    "block_outputs": "singer.backbones",
    "match_blocks": "singer.matching",
    "resize_tokens": "singer.tokens",
    "robust_threshold": "singer.artifacts",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562): code that needs only an error class does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
