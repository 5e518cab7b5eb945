"""Where a cache lies: a folder, or a prefix in an object store, behind one small interface.

Objects are written whole and appear all at once; they are read whole or by byte ranges.
"""

from pathlib import Path

from pipeline.stores.base import LOCK, Place, Ranges, Store, is_remote
from pipeline.stores.files import write_atomic
from pipeline.stores.local import LocalStore
from pipeline.stores.open_files import Opened, OpenFile
from pipeline.stores.remote import RemoteStore
from pipeline.stores.through import ReadThrough

__all__ = [
    "LOCK",
    "LocalStore",
    "OpenFile",
    "Opened",
    "Place",
    "Ranges",
    "ReadThrough",
    "RemoteStore",
    "Store",
    "is_remote",
    "open_store",
    "write_atomic",
]


def open_store(place: Place) -> Store:
    """The store at a path or URL. Raises UserError for a URL that cannot be used."""
    return RemoteStore.open(str(place)) if is_remote(place) else LocalStore(Path(place))
