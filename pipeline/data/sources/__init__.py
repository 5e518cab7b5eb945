"""The kinds of sources of images. A new kind is a file here and a line in the registry."""

from pathlib import Path

from pipeline.data.sources.folder import FOLDER
from pipeline.data.sources.kind import Kind, Options, Reader
from pipeline.data.sources.lists import LIST
from pipeline.data.sources.tables import TABLE
from pipeline.data.sources.tar import TAR

__all__ = ["KINDS", "Kind", "Options", "Reader", "kind_of"]

# The first kind that takes a path has it.
KINDS: tuple[Kind, ...] = (FOLDER, LIST, TABLE, TAR)


def kind_of(path: Path) -> Kind:
    """Return the kind of a source, or of a container."""
    return next(kind for kind in KINDS if kind.takes(path))
