"""The lock of a prefix in an object store: an object that its holder replaces by a new version again and again."""

import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from pipeline.runtime.progress import say
from singer.errors import UserError

if TYPE_CHECKING:  # obstore has no such names at run time
    from obstore import PutMode, PutResult, UpdateVersion
    from obstore.store import ObjectStore

# A lock that has not been renewed for so many seconds is dead. Its holder renews it four times in that time.
SECONDS = 60.0
_TRIES = 3


class RemoteLock:
    """An object that only the writer of its last version replaces. lost: another run has taken it."""

    def __init__(self, client: "ObjectStore", key: str) -> None:
        self._client, self._key = client, key
        self._holder = f"{socket.gethostname()} process {os.getpid()}"
        self._token, self._count = secrets.token_hex(8), 0
        self.lost = False
        self._version: UpdateVersion = {}

    def take(self, place: str) -> None:
        """Take the lock. Raises UserError if another run holds it."""
        if self._put("create"):
            return
        first = now = self._look()
        if first is not None:
            say(f"{place} is locked by {first[0]}; watching for {SECONDS:.0f} s whether that run is alive")
        end = time.monotonic() + SECONDS
        while now is not None and now == first and time.monotonic() < end:
            time.sleep(SECONDS / 60)
            now = self._look()
        if not self._put("create" if now is None or now != first else now[1]):
            raise UserError(f"{place} is being written by another run ({(now or first or ('unknown',))[0]})")

    def renew(self) -> None:
        """Renew the lock, or find that it is lost."""
        self.lost = not self._put(self._version)

    def _put(self, mode: "PutMode") -> bool:
        """Write the next version of the lock. Return False if the mode does not allow it."""
        # No two versions have the same content, because stores may distinguish versions by it.
        self._count += 1
        content = f"{self._holder}\n{self._token} {self._count}".encode()
        try:
            self._version = _version(self._put_again(content, mode))
        except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
            if is_bucket_missing(error):
                raise
            # If the answer to a request was lost, the client's second try has found what the first one wrote.
            found = self._look(content)
            if found is None:
                return False
            self._version = found[1]
        return True

    def _put_again(self, content: bytes, mode: "PutMode") -> "PutResult":
        """Put, and repeat it if a connection was lost. The client does not, as a second try may meet the first one."""
        for _ in range(_TRIES - 1):
            try:
                return obstore.put(self._client, self._key, content, mode=mode)
            except BaseError as error:
                if not is_connection_lost(error):
                    raise
        return obstore.put(self._client, self._key, content, mode=mode)

    def _look(self, content: bytes | None = None) -> "tuple[str, UpdateVersion] | None":
        """Return holder and version of the lock, or None if there is none or it does not have the given content."""
        try:
            found = obstore.get(self._client, self._key)
            data = bytes(found.bytes())
        except FileNotFoundError:
            return None
        if content not in (None, data):
            return None
        return data.decode(errors="replace").partition("\n")[0], _version(found.meta)


# The locks of running stages, by the URLs of their stores; a stage opens its store more than once. What the thread of a
# stage that has ended still finds out about its lock says nothing about the next one's.
held: dict[str, RemoteLock] = {}


def check(url: str) -> None:
    """Raise UserError if this process has lost the lock of the store at `url`, or of one above it."""
    for place, lock in tuple(held.items()):
        if lock.lost and f"{url}/".startswith(f"{place}/"):
            raise UserError(
                f"{place} has been taken over by another run, because this one did not reach it for {SECONDS:.0f} s; "
                "continue with --resume when the other run has ended"
            )


def _version(result: Mapping[str, Any]) -> "UpdateVersion":
    found: UpdateVersion = {}
    if result["e_tag"] is not None:
        found["e_tag"] = result["e_tag"]
    if result["version"] is not None:
        found["version"] = result["version"]
    return found


def is_bucket_missing(error: Exception) -> bool:
    """Return whether an error says that the bucket does not exist."""
    return "<Code>NoSuchBucket</Code>" in str(error)


def is_connection_lost(error: Exception) -> bool:
    """Return whether a connection was lost with a request that the client does not repeat by itself."""
    first = str(error).partition("\n")[0]
    return "error sending request" in first and " retries" not in first
