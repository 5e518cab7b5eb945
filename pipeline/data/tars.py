"""The content of a tar, which may be hostile: every defect is reported, and only headers and labels are read.

tarfile ends an iteration silently at a broken header and believes what headers claim. This module uses its parser of
single headers, and walks from one header to the next itself.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.formats import IMAGE_EXTENSIONS

LABEL_EXTENSION = "cls"
NO_LABEL = -1
_LABEL_BYTES = 32
_ROW = np.dtype("i8,u8,i4,i8,i8,?")
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
# Key and extensions, split as in the webdataset library; importing it would load torch into every reader of tars.
_SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$")
# Names are unsafe that are empty, absolute, not UTF-8 (tarfile turns that into surrogates), or have `..`, a backslash
# or a control character.
UNSAFE = re.compile(r"^(?:/|\Z)|(?:^|/)\.\.(?:/|\Z)|[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Defect(Exception):
    """What is wrong with a sample, or with a shard from some byte on: the rest of a sentence about it."""


@dataclass(frozen=True)
class Member:
    """An entry of a tar. regular: it is an ordinary file; offset, size: place of its data, in bytes."""

    name: str
    regular: bool
    offset: int
    size: int


@dataclass
class Sample:
    """Consecutive members with one key, by extension. label: text of .cls; repeated: extensions that occur twice."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    label: bytes | None = None
    repeated: list[str] = field(default_factory=list)
    defect: str | None = None


def read_samples(path: Path, *also: str) -> tuple[list[Sample], str | None]:
    """Read the samples of a shard, and what is wrong with it as a whole. also: further extensions that matter."""
    samples: list[Sample] = []
    try:
        with path.open("rb", buffering=0) as file:
            for member in members_of(file.fileno()):
                _add_member(samples, member, file.fileno(), also)
    except (Defect, OSError) as error:
        if samples:
            samples[-1].defect = "may have lost members: the shard is damaged after it"
        return samples, str(error) if isinstance(error, Defect) else f"cannot be read: {error.strerror}"
    return samples, None


def _add_member(samples: list[Sample], member: Member, file: int, also: tuple[str, ...]) -> None:
    """Add a member to the last sample, or begin a new one."""
    unsafe = UNSAFE.search(member.name) is not None
    named = _SAMPLE.match(member.name)
    if named is not None:
        key, extension = named.groups()
    elif unsafe:
        key, extension = member.name, ""
    else:
        return
    if not samples or samples[-1].key != key:
        samples.append(Sample(key))
    sample, extension = samples[-1], extension.lower()
    if unsafe:
        sample.defect = f"has the unsafe name {member.name!r}"
    elif extension in sample.members:
        sample.repeated.append(extension)
    elif extension in (LABEL_EXTENSION, *IMAGE_EXTENSIONS, *also):
        sample.members[extension] = member
        if extension == LABEL_EXTENSION and member.regular and member.size <= _LABEL_BYTES:
            sample.label = os.pread(file, member.size, member.offset)


@dataclass(frozen=True)
class TarListing:
    """The samples of a shard as columns, with the unusable ones.

    size: size of the file, in bytes; key_text: uint8, UTF-8 of all keys; key_ends: int64; hashes: uint64, see key_hash;
    labels: int32; offsets, sizes: int64, places of the images; usable: bool; defects: (number of the sample, its key,
    what is wrong), in order, with number -1 for the shard itself.
    """

    size: int
    key_text: np.ndarray
    key_ends: np.ndarray
    hashes: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    usable: np.ndarray
    defects: list[tuple[int, str, str]]


def list_tar(path: Path) -> TarListing:
    """List the samples of a shard. Its content raises no error: defects are listed."""
    samples, damage = read_samples(path)
    defects = [(-1, "", damage)] if damage is not None else []
    rows = np.zeros(len(samples), dtype=_ROW)
    text = bytearray()
    for number, sample in enumerate(samples):
        key = sample.key.encode(errors="backslashreplace")
        text += key
        defects += [(number, sample.key, f"has two members .{extension}") for extension in sample.repeated]
        try:
            label, image = contents(sample)
            rows[number] = len(text), key_hash(key), label, image.offset, image.size, True
        except Defect as defect:
            defects.append((number, sample.key, str(defect)))
            rows[number] = len(text), key_hash(key), NO_LABEL, 0, 0, False
    ends, hashes, labels, offsets, sizes, usable = (np.ascontiguousarray(rows[name]) for name in _ROW.names or ())
    letters = np.frombuffer(bytes(text), np.uint8)
    return TarListing(path.stat().st_size, letters, ends, hashes, labels, offsets, sizes, usable, defects)


def key_hash(key: bytes) -> int:
    """Return the first 8 bytes (little-endian) of a key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def contents(sample: Sample) -> tuple[int, Member]:
    """Return label and image of a sample. Raises Defect if there is no usable image or label."""
    if sample.defect is not None:
        raise Defect(sample.defect)
    image = next((sample.members[e] for e in IMAGE_EXTENSIONS if e in sample.members), None)
    if image is None:
        raise Defect(f"has no image ({', '.join(IMAGE_EXTENSIONS)})")
    if not image.regular:
        raise Defect("has an image that is no regular file")
    if not image.size:
        raise Defect("has an empty image")
    if LABEL_EXTENSION not in sample.members:
        return NO_LABEL, image
    text = (sample.label or b"").strip()
    if text == b"-1":
        return NO_LABEL, image
    if not text.isdigit() or int(text) >= 2**31:
        raise Defect(f"has a label that is no class number: {text[:20]!r}")
    return int(text), image


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
    while True:
        block = window.read(position)
        if len(block) < _BLOCK:
            raise Defect("ends in the middle of a header" if block else "has no end-of-archive marker")
        plain = _plain_file(block)
        if plain is not None and not (common or own):
            name, size = plain
            position += _BLOCK
            if position + size > end:
                raise Defect("ends in the middle of a member")
            yield Member(name, True, position, size)
            position += -(-size // _BLOCK) * _BLOCK
            extended = False
            continue
        if not any(block):
            break
        broken = Defect(f"is unreadable from byte {position}" if position else "is no uncompressed tar")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            raise broken from None
        position += _BLOCK
        kind, size = header.type, header.size
        extended = kind in _EXTENDED
        # An extended header that looks like a file, or the other way round, would hide the member after it.
        reserved = header.name.startswith("././@") and not extended
        if reserved or (kind in _GNU_LONG) != (header.name == "././@LongLink"):
            raise broken
        more = kind == tarfile.GNUTYPE_SPARSE and block[482]
        while more:  # a sparse file with many holes: further blocks list them
            block = os.pread(file, _BLOCK, position)
            position += _BLOCK
            more = len(block) == _BLOCK and block[504]
        attributes = {} if extended else common | own
        if "linkpath" in attributes and header.isreg():
            raise broken
        if "size" in attributes:
            size = int(attributes["size"])
        if not (extended or header.isreg() or kind not in tarfile.SUPPORTED_TYPES):
            size = 0  # links, folders and devices have no data, whatever they claim
        if size < 0 or (extended and size > _EXTENDED_BYTES):
            raise broken
        if position + size > end:
            raise Defect("ends in the middle of a member")
        if extended:
            try:
                found = _extension(kind, os.pread(file, size, position))
            except ValueError:
                raise broken from None
            if kind == tarfile.XGLTYPE:
                common |= found
            elif own.keys() & found.keys():  # the member of the first header is missing
                raise broken
            else:
                own |= found
        else:
            name = attributes.get("GNU.sparse.name", attributes.get("path", header.name))
            regular = header.isreg() and kind != tarfile.GNUTYPE_SPARSE and "GNU.sparse" not in attributes
            yield Member(name.rstrip("/"), regular, position, size)
            own = {}
        position += -(-size // _BLOCK) * _BLOCK
    if extended:
        raise Defect(f"is unreadable from byte {position}")
    while rest := os.pread(file, 1 << 20, position):
        if any(rest):
            raise Defect(f"holds more than zeros from byte {position} on, after its end-of-archive marker")
        position += len(rest)


class _Window:
    """Blocks of a file. Neighbouring blocks are read at once, as the headers of small members are close together."""

    def __init__(self, file: int) -> None:
        self._file, self._start, self._data = file, 0, b""

    def read(self, position: int) -> bytes:
        """Return the block at a position; it is shorter at the end of the file."""
        at = position - self._start
        if at < 0 or at + _BLOCK > len(self._data):
            self._start, self._data, at = position, os.pread(self._file, _WINDOW, position), 0
        return self._data[at : at + _BLOCK]


def _plain_file(block: bytes) -> tuple[str, int] | None:
    """Return name and size of an ordinary file with a short ASCII name, from its header; None for any other header.

    tarfile gives the same, but takes four times as long (docs/log.md). Nearly all headers are of this kind.
    """
    found = _PLAIN.fullmatch(block)
    if found is None or sum(block) - sum(block[148:156]) + 256 != int(found["sum"], 8):
        return None
    return found["name"].decode(), int(found["size"], 8)


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
