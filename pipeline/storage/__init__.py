"""The place of a cache: a folder, or a prefix in an object store, with one small interface for both.

Objects are written whole and appear all at once; they are read whole or by byte ranges.
"""

from pathlib import Path

from pipeline.storage.atomic import naming, whole_file, write_atomic
from pipeline.storage.base import LOCK, Place, Ranges, Store, is_remote
from pipeline.storage.local import LocalStore
from pipeline.storage.local_copy import CopyRoom, ReadThrough
from pipeline.storage.open_files import Opened, OpenFile
from pipeline.storage.remote import RemoteStore

__all__ = [
    "LOCK",
    "CopyRoom",
    "LocalStore",
    "OpenFile",
    "Opened",
    "Place",
    "Ranges",
    "ReadThrough",
    "RemoteStore",
    "Store",
    "is_remote",
    "naming",
    "open_store",
    "whole_file",
    "write_atomic",
]


def open_store(place: Place) -> Store:
    """Return the store at a path or URL. Raises UserError for a URL that cannot be used."""
    return RemoteStore.open(str(place)) if is_remote(place) else LocalStore(Path(place))
