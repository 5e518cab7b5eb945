"""Files at URLs that are copied to this machine, because images are read by their place, again and again."""

import fnmatch
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.runtime.progress import say
from pipeline.storage.atomic import TEMPORARY
from pipeline.storage.file_locks import flock
from pipeline.storage.remote import RemoteStore
from singer.errors import UserError

_MAGIC = set("*?[")
_WEB = ("http", "https")


def folder() -> Path:
    """Return where copies are kept: SINGER_DOWNLOADS, or singer/downloads in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SINGER_DOWNLOADS") or Path(home) / "singer" / "downloads")


def download(url: str) -> list[Path]:
    """Copy the files that a URL names, and return the copies; `*`, `?` and `[` match names in a store's folder.

    A copy is kept, and taken again as long as the file at the URL has the same size and version. Raises UserError for
    a URL that cannot be used, and OSError of one line if the network or the store fails.
    """
    scheme, _, rest = url.partition("://")
    place, _, name = rest.rpartition("/")
    if not place or not name:
        place = f"{url}BUCKET" if url.endswith("://") else url.rstrip("/")
        raise UserError(f"{url!r} names no file; give one or several, such as '{place}/*.tar'")
    client = RemoteStore.open(f"{scheme}://{place}", also=_WEB)
    if _MAGIC.isdisjoint(name):
        names = [name]
    elif scheme in _WEB:
        raise UserError(f"{url!r}: a web server has no list of its files; give a brace range, such as {{0000..0009}}")
    else:
        names = sorted(n for n in client.sizes() if "/" not in n and fnmatch.fnmatchcase(n, name))
        if not names:
            raise UserError(f"nothing matches {url!r}")
    return [_copy(client, name) for name in names]


def _copy(store: RemoteStore, name: str) -> Path:
    """Return the local copy of a file; make it first if there is none of this version."""
    url = f"{store.url}/{name}"
    with _named(url):
        meta: Any = store.about(name)
    version = f"{url}\n{meta['size']}\n{meta['e_tag']}\n{meta['last_modified']}"
    target = folder() / hashlib.sha256(version.encode()).hexdigest()[:16] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # One of the processes of this machine copies, and the others wait. Where a file system has no flock, each copies.
    with target.with_name(f".{name}.lock").open("w") as lock:
        flock(lock.fileno(), target, wait=True)
        if not target.is_file() or target.stat().st_size != meta["size"]:
            say(f"copying {url} ({meta['size'] / 1e6:.4g} MB) to {target}")
            unfinished = target.with_name(f".{name}.{os.getpid()}{TEMPORARY}")
            try:
                with _named(url):
                    store.copy(name, unfinished)
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())  # or a power cut may leave the name without the bytes
                unfinished.rename(target)
            finally:
                unfinished.unlink(missing_ok=True)
    return target


@contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{url} does not exist") from None
