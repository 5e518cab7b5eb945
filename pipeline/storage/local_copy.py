"""Local copies of remote objects."""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.storage.atomic import TEMPORARY, is_at, write_durably
from pipeline.storage.base import Ranges, Store
from pipeline.storage.file_locks import flock
from pipeline.storage.local import LocalStore
from singer.errors import UserError


class ReadThrough:
    """A store that copies large objects to a local folder when they are first needed, and reads them there.

    checksums: {name: SHA-256} of the objects; an object that does not match is refused. A copy is named by its
    checksum, so that the copy of an object that has since been replaced is never taken for the new one. If processes
    share the folder, one of them fetches an object and the others wait.
    """

    def __init__(self, source: Store, folder: Path, checksums: Mapping[str, str]) -> None:
        self._source, self._local, self._checksums = source, LocalStore(folder), checksums

    @property
    def url(self) -> str:
        """Return the URL of the store that is copied."""
        return self._source.url

    def read_ranges(self, ranges: Ranges) -> None:
        """Fill ranges.out from local copies. Raises UserError if an object does not match its checksum."""
        for name in (ranges.names[n] for n in np.unique(ranges.which).tolist()):
            copy = self._local.path / self._checksums[name]
            while not copy.is_file():
                self._fetch(name, copy)
        self._local.read_ranges(ranges._replace(names=[self._checksums.get(n, "") for n in ranges.names]))

    def _fetch(self, name: str, copy: Path) -> None:
        """Copy an object, or wait until another thread or process has done so or has given up."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_name(f".{copy.name}{TEMPORARY}")
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not flock(file, copy, wait=True):
                # Each process and thread copies for itself, to a file of its own.
                os.close(file)
                unfinished.unlink(missing_ok=True)
                unfinished = copy.with_name(f".{copy.name}.{secrets.token_hex(8)}{TEMPORARY}")
                file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            elif not is_at(file, unfinished):
                return
            try:
                data = self._source.read(name)
                if hashlib.sha256(data).hexdigest() != self._checksums[name]:
                    raise UserError(f"{self.url}/{name} does not match its checksum; run singer cache verify")
                os.ftruncate(file, 0)  # what a process that died has left
                write_durably(file, copy, data)
                unfinished.rename(copy)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        finally:
            os.close(file)
