"""Damage for archives: what discs, networks and malice do to a tar."""

import random
import tarfile
from collections.abc import Iterator

BLOCK = tarfile.BLOCKSIZE
_NAMES = (b"", b"/etc/x.png", b"../x.png", b"a/../x.png", b"a\\x.png", b"\xff\xfe.png", b"bell\a.png", b"other.png")
_SIZES = (b"77777777777\0", b"0" * 11 + b"\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"-0000000777\0", b"00000002000\0")
_FIELDS = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "magic": (257, 8), "prefix": (345, 155)}


def mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged copies of a tar, each with a description that begins with the kind of damage and a colon.

    Kinds take turns: flip, cut, zero, splice, header. Only in "header" are checksums made to fit again.
    """
    rng = random.Random(seed)
    kinds = (_flip, _cut, _zero, _splice, _header)
    for number in range(count):
        yield kinds[number % len(kinds)](data, rng)


def headers(data: bytes) -> list[int]:
    """Where the blocks are that can be read as a header, in bytes."""
    found = []
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        try:
            tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        found.append(at)
    return found


def _flip(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    damaged = bytearray(data)
    places = sorted(rng.sample(range(len(data)), rng.choice((1, 1, 8))))
    for at in places:
        damaged[at] ^= rng.randrange(1, 256)
    return f"flip: bytes {places}", bytes(damaged)


def _cut(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    at = rng.randrange(len(data))
    at -= rng.choice((0, at % BLOCK))
    return f"cut: at {at}", data[:at]


def _zero(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    length = rng.choice((1, 100, BLOCK, 4 * BLOCK, len(data)))
    start = rng.randrange(len(data))
    start -= rng.choice((0, start % BLOCK))
    stop = min(len(data), start + length)
    return f"zero: {start} to {stop}", data[:start] + bytes(stop - start) + data[stop:]


def _splice(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A run of blocks is left out, repeated or copied over another place."""
    blocks = len(data) // BLOCK
    start = rng.randrange(blocks) * BLOCK
    stop = start + rng.randrange(1, 5) * BLOCK
    to = rng.randrange(blocks) * BLOCK
    what = rng.choice(("leave out", "repeat", "copy"))
    piece = data[start:stop]
    parts = {
        "leave out": data[:start] + data[stop:],
        "repeat": data[:to] + piece + data[to:],
        "copy": data[:to] + piece + data[to + len(piece) :],
    }
    return f"splice: {what} {start} to {stop} at {to}", parts[what]


def _header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One field of a header is another, mostly with a checksum that fits."""
    at = rng.choice(headers(data))
    name = rng.choice(list(_FIELDS))
    start, length = _FIELDS[name]
    values = {
        "name": _NAMES,
        "size": _SIZES,
        "type": tuple(bytes([kind]) for kind in b"01234567LKxgXSVMDN?"),
    }.get(name, (rng.randbytes(length), rng.randbytes(4)))
    value = rng.choice(values).ljust(length, b"\0")
    block = bytearray(data[at : at + BLOCK])
    block[start : start + length] = value
    fits = rng.random() < 0.8
    if fits:
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
    return f"header: at {at}, {name} = {value[:20]!r}, checksum fits: {fits}", data[:at] + block + data[at + BLOCK :]
