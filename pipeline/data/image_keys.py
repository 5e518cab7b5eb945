"""Keys of images: names of files and sources, as far as a key can hold them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.tars import UNSAFE


def file_keys(names: Sequence[str]) -> list[str]:
    """Return a key for each file, given its name relative to the data set; keys differ as the names do.

    A key is the name without its suffix, with "_" for dots: WebDataset ends a key at its first dot. Characters that
    are not allowed in a tar are percent-escaped, byte by byte. Names that would get the same key keep their suffix and
    have escaped dots.
    """
    keys = [_plain(name) for name in names]
    while True:
        counts = Counter(keys)
        again = [n for n, key in enumerate(keys) if counts[key] > 1]
        changed = [n for n in again if keys[n] != _whole(names[n])]
        if not changed:
            return keys
        for n in changed:
            keys[n] = _whole(names[n])


def _plain(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.rpartition(".")
    return _safe(f"{folder}{slash}{stem if dot and stem else file}".replace(".", "_"))


def _whole(name: str) -> str:
    """Return a key from which the name can be read back."""
    return _safe(name.replace("%", "%25").replace(".", "%2E"))


def _safe(key: str) -> str:
    key = key.lstrip("/")
    return UNSAFE.sub(lambda found: _escaped(found[0]), key) if UNSAFE.search(key) else key


def _escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode(errors="surrogateescape"))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a key for each path: its name without suffixes, after as many of its folders as tell all paths apart."""
    parts = [path.resolve().parts for path in paths]
    stems = [[*p[1:-1], p[-1].partition(".")[0] or p[-1]] for p in parts]
    for depth in range(1, max(map(len, stems)) + 1):
        names = [_safe("/".join(stem[-depth:]).replace(".", "_")) for stem in stems]
        if len(set(names)) == len(names):
            return names
    return [f"{number}/{name}" for number, name in enumerate(names)]
