"""The members of a tar, which may be hostile: every defect is reported, and only headers are read.

tarfile ends an iteration silently at a broken header and believes what headers claim. This module uses its parser of
single headers, and walks from one header to the next itself.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_BLOCK = tarfile.BLOCKSIZE
# These headers describe the member after them.
_GNU_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENDED = (*_GNU_LONG, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# These are the keywords of POSIX; those of vendors have a dot. Any other may be a damaged `path`.
_PAX_KEYWORDS = frozenset(
    b"atime charset comment ctime gid gname hdrcharset linkpath mtime path size uid uname".split()
)
# The header of an ordinary file: a name of printable ASCII, octal numbers, no link, no prefix.
_PLAIN = re.compile(
    rb"(?!\./\./@)(?P<name>[ -~]{0,99}[ -.0-~])\0*(?<=.{100})(?:[0-7]{7}\0){3}(?P<size>[0-7]{11})[\0 ][0-7]{11}[\0 ]"
    rb"(?P<sum>[0-7]{6})\0 [0\0]\0{100}ustar(?:\x0000|  \0).{64}[0-7\0]{16}\0{167}",
    re.DOTALL,
)
# A disk reads this much at once anyway.
_WINDOW = 8 * _BLOCK
# Extended headers hold names; a larger one is not honest.
_EXTENDED_BYTES = 1 << 20


class Defect(Exception):
    """What is wrong with a sample, or with a shard from some byte on: the rest of a sentence about it."""


@dataclass(frozen=True)
class Member:
    """An entry of a tar. regular: it is an ordinary file; offset, size: place of its data, in bytes."""

    name: str
    regular: bool
    offset: int
    size: int


def members_of(file: int) -> Iterator[Member]:
    """Yield the members of a tar, and check that it is whole: headers and files are within it, and zeros end it.

    tarfile itself takes a broken header for the end of the archive, and believes the sizes that headers claim.
    Here the position only grows, and nothing but headers is read. Raises Defect if the tar is not whole.
    """
    end = os.fstat(file).st_size
    window = _Window(file)
    position = 0
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    extended = False  # the last header belongs to a member that is still to come
    while any(block := window.read(position)):
        plain = None if common or own else plain_file(block)
        if plain is not None:
            name, size = plain
            position += _BLOCK
            if position + size > end:
                raise _cut_off()
            yield Member(name, True, position, size)
            position += -(-size // _BLOCK) * _BLOCK
            extended = False
            continue
        broken = Defect(f"is unreadable from byte {position}" if position else "is not an uncompressed tar")
        try:
            header = _header(block)
            extended = header.type in _EXTENDED
            attributes = {} if extended else common | own
            position = _data_start(file, position, block, header)
            size = _data_size(header, attributes)
            if position + size > end:
                raise _cut_off()
            if extended:
                found = _extension(header.type, os.pread(file, size, position))
                if header.type == tarfile.XGLTYPE:
                    common |= found
                elif own.keys() & found.keys():  # the member of the first header is missing
                    raise broken
                else:
                    own |= found
        except (tarfile.HeaderError, ValueError):
            raise broken from None
        if not extended:
            name = attributes.get("GNU.sparse.name", attributes.get("path", header.name))
            regular = header.isreg() and header.type != tarfile.GNUTYPE_SPARSE and "GNU.sparse" not in attributes
            yield Member(name.rstrip("/"), regular, position, size)
            own = {}
        position += -(-size // _BLOCK) * _BLOCK
    if extended:
        raise Defect(f"is unreadable from byte {position}")
    _check_zeros(file, position)


def _cut_off() -> Defect:
    return Defect("ends in the middle of a member")


def _check_zeros(file: int, position: int) -> None:
    """Raise Defect if something other than zeros follows a position."""
    while rest := os.pread(file, 1 << 20, position):
        if any(rest):
            raise Defect(f"holds more than zeros from byte {position} on, after its end-of-archive marker")
        position += len(rest)


class _Window:
    """Blocks of a file. Neighbouring blocks are read at once, as the headers of small members are close together."""

    def __init__(self, file: int) -> None:
        self._file, self._start, self._data = file, 0, b""

    def read(self, position: int) -> bytes:
        """Return the block at a position. Raises Defect if the file ends before it, or within it."""
        at = position - self._start
        if at < 0 or at + _BLOCK > len(self._data):
            self._start, self._data, at = position, os.pread(self._file, _WINDOW, position), 0
        block = self._data[at : at + _BLOCK]
        if len(block) < _BLOCK:
            raise Defect("ends in the middle of a header" if block else "has no end-of-archive marker")
        return block


def plain_file(block: bytes) -> tuple[str, int] | None:
    """Return name and size of an ordinary file with a short ASCII name, from its header; None for any other header.

    tarfile gives the same, but takes four times as long (docs/log.md). Nearly all headers are of this kind.
    """
    found = _PLAIN.fullmatch(block)
    if found is None or sum(block) - sum(block[148:156]) + 256 != int(found["sum"], 8):
        return None
    return found["name"].decode(), int(found["size"], 8)


def _header(block: bytes) -> tarfile.TarInfo:
    """Parse a header. Raises HeaderError or ValueError if it is broken."""
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    # An extended header that looks like a file, or the other way round, would hide the member after it.
    reserved = header.name.startswith("././@") and header.type not in _EXTENDED
    if reserved or (header.type in _GNU_LONG) != (header.name == "././@LongLink"):
        raise ValueError
    return header


def _data_start(file: int, position: int, block: bytes, header: tarfile.TarInfo) -> int:
    """Return where the data of the header at a position begins: after more blocks, if it is a sparse file's."""
    position += _BLOCK
    more = header.type == tarfile.GNUTYPE_SPARSE and block[482]
    while more:  # a sparse file with many holes: further blocks list them
        block = os.pread(file, _BLOCK, position)
        position += _BLOCK
        more = len(block) == _BLOCK and block[504]
    return position


def _data_size(header: tarfile.TarInfo, attributes: Mapping[str, str]) -> int:
    """Return the bytes of data after a header.

    attributes: of the member, from the extended headers before it. Raises ValueError if they cannot be right.
    """
    extended = header.type in _EXTENDED
    if "linkpath" in attributes and header.isreg():
        raise ValueError
    size = int(attributes.get("size", header.size))
    if not (extended or header.isreg() or header.type not in tarfile.SUPPORTED_TYPES):
        size = 0  # links, folders and devices have no data, whatever they claim
    if size < 0 or (extended and size > _EXTENDED_BYTES):
        raise ValueError
    return size


def _extension(kind: bytes, payload: bytes) -> dict[str, str]:
    """Read from an extended header path, size, and whether a file is sparse. Raises ValueError if it is broken."""
    if kind in _GNU_LONG:
        name = payload.removesuffix(b"\0")
        if not name or b"\0" in name:
            raise ValueError
        return {"path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath": name.decode("utf-8", "surrogateescape")}
    values: dict[str, str] = {}
    at = 0
    while at < len(payload):  # records of pax: LENGTH KEYWORD=VALUE and a line break
        length = payload[at : at + 8].partition(b" ")[0]
        stop = at + int(length)
        keyword, _, value = payload[at + len(length) + 1 : stop].partition(b"=")
        known = keyword in _PAX_KEYWORDS or b"." in keyword
        if not (known and at < stop <= len(payload) and value.endswith(b"\n")):
            raise ValueError
        if keyword in (b"path", b"GNU.sparse.name"):
            values[keyword.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            values["size"] = str(int(value))
        if keyword.startswith(b"GNU.sparse."):
            values["GNU.sparse"] = ""
        at = stop
    return values
