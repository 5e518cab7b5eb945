"""WebDataset shards: their files, and what is in them.

The order of training is singer's own, so members are read by position, not streamed. Every defect is raised or listed.
"""

import glob
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from braceexpand import braceexpand

from pipeline.data.images import Images, Keys, Skipped
from pipeline.data.tars import UNSAFE, TarListing, list_tar, read_samples
from pipeline.runtime.progress import meter
from singer.errors import UserError

OnError = Literal["fail", "skip"]
# With this many shards or more, starting processes takes less time than they save.
_MANY_SHARDS = 64
_SHARDS_AT_ONCE = 4


def expand_shards(spec: str | Sequence[str]) -> list[Path]:
    """Expand globs, brace ranges (`train-{0000..0004}.tar`) and names to shard files, in order.

    Raises UserError if one matches nothing, a file is missing, or a file is given twice.
    """
    paths: list[Path] = []
    for pattern in [spec] if isinstance(spec, str) else spec:
        for name in _names(os.fspath(pattern)):
            if glob.has_magic(name) and not Path(name).is_file():
                found = sorted(Path(p) for p in glob.glob(name))  # noqa: PTH207 (absolute patterns too)
                if not found:
                    raise UserError(f"no shard matches {name!r}")
                paths += found
            else:
                paths.append(Path(name))
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise UserError(f"shard {missing[0]} does not exist" + (f" (nor {len(missing) - 1} more)" * (len(missing) > 1)))
    if not paths:
        raise UserError("no shards given")
    if len(set(paths)) < len(paths):
        raise UserError(f"shard {Counter(paths).most_common(1)[0][0]} is given twice")
    return paths


def _names(pattern: str) -> list[str]:
    """Expand brace ranges and lists. Raises UserError if a brace has no partner."""
    try:
        return [pattern] if Path(pattern).is_file() else list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"shards {pattern}: a brace has no partner; write \\{{ for a brace in a name") from None


@dataclass
class Defects:
    """Collects defects: raises UserError at the first one, or lists all."""

    on_error: OnError
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, path: Path, key: str, reason: str) -> None:
        """Raise UserError for a defect, or list it."""
        # The key is printed and stored, so it must be harmless.
        key = key.encode("unicode_escape").decode() if UNSAFE.search(key) else key
        if self.on_error == "fail":
            where = Skipped(str(path), key, reason)
            raise UserError(f"{where}; repair it, or cache without it (cache.on_error=skip)")
        self.skipped.append(Skipped(path.name, key, reason))


def index_shards(spec: str | Sequence[str], on_error: OnError = "fail") -> Images:
    """List the images of shards from the tar headers.

    A defect is a damaged archive or an unusable sample: without an image, an empty image, a label that is no class
    number, a link in place of a file, a key that occurs twice (the first one counts) or is unsafe as a path. The
    samples before the damage of a shard stay, without the last one, which may have lost members. As in the
    webdataset library, files with a name that has no extension or begins with a dot belong to no sample.

    Raises UserError for a shard that is missing, if there are no images at all, and for the first defect unless
    on_error is "skip"; then defects are listed in `skipped`.
    """
    paths = expand_shards(spec)
    listings = _list_all(paths)
    usable = np.concatenate([listing.usable for listing in listings])
    keys = Keys.join([Keys(listing.key_text, listing.key_ends) for listing in listings])
    starts = np.cumsum([0, *(len(listing.usable) for listing in listings)])
    twice = _repeated(keys, np.concatenate([listing.hashes for listing in listings])) & usable
    found = [(s, *defect) for s, listing in enumerate(listings) for defect in listing.defects]
    for row in np.flatnonzero(twice).tolist():
        s = int(np.searchsorted(starts, row, side="right")) - 1
        found.append((s, row - int(starts[s]), keys[row], "occurs twice"))
    defects = Defects(on_error)
    for s, _, key, reason in sorted(found, key=lambda f: f[:2]):
        defects.add(paths[s], key, reason)
    rows = np.flatnonzero(usable & ~twice)
    if not len(rows):
        also = f"; the first defect: {defects.skipped[0]}" if defects.skipped else ""
        raise UserError(f"no images in {len(paths)} shards, the first of them {paths[0]}{also}")
    images = Images(
        tuple(p.resolve() for p in paths),
        tuple(listing.size for listing in listings),
        keys,
        np.concatenate([listing.labels for listing in listings]),
        np.repeat(np.arange(len(paths), dtype=np.int32), np.diff(starts)),
        np.concatenate([listing.offsets for listing in listings]),
        np.concatenate([listing.sizes for listing in listings]),
        tuple(defects.skipped),
    )
    return images if len(rows) == len(images) else images.select(rows)


def _list_all(paths: Sequence[Path]) -> list[TarListing]:
    """List shards, many of them in one process for each core, because Python reads headers on one core only."""
    cores = len(os.sched_getaffinity(0))
    pool: Executor = ThreadPoolExecutor(min(len(paths), 2 * cores))
    if len(paths) >= _MANY_SHARDS and cores > 1:
        # The processes are fresh: a fork of a process with threads may hang.
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver"))
    with pool, meter("index", len(paths), "shards") as m:
        listings = []
        for listing in pool.map(list_tar, paths, chunksize=_SHARDS_AT_ONCE):
            listings.append(listing)
            m.advance(1)
    return listings


def _repeated(keys: Keys, hashes: np.ndarray) -> np.ndarray:
    """Return which keys, (n,) bool, have occurred before."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    again = np.zeros(len(keys), dtype=np.bool_)
    seen: set[str] = set()
    # There is hardly ever anything to do: different keys nearly always have different hashes.
    for row in order[np.union1d(same, same + 1)].tolist():
        again[row] = keys[row] in seen
        seen.add(keys[row])
    return again


def index_beside(images: Images, extension: str) -> Images:
    """Index the members .{extension} beside the images: the same rows, with the places and sizes of these members.

    Raises UserError that names shard and key if one is missing, empty, no regular file or there twice.
    """
    offset, size = np.zeros_like(images.offset), np.zeros_like(images.size)
    order = np.argsort(images.shard, kind="stable")
    ends = np.searchsorted(images.shard[order], np.arange(len(images.paths)), side="right").tolist()
    for path, start, end in zip(images.paths, [0, *ends], ends, strict=False):
        samples = {sample.key: sample for sample in read_samples(path, extension)[0]}
        for row in order[start:end].tolist():
            sample = samples.get(images.keys[row])
            member = None if sample is None else sample.members.get(extension)
            if sample is None or member is None:
                reason = f"has no .{extension}; every image needs one here"
            elif extension in sample.repeated:
                reason = f"has two members .{extension}; remove one"
            elif not member.regular or not member.size:
                reason = f"has a .{extension} that is {'empty' if member.regular else 'no regular file'}; replace it"
            else:
                offset[row], size[row] = member.offset, member.size
                continue
            raise UserError(str(Skipped(str(path), images.keys[row], reason)))
    return replace(images, offset=offset, size=size)


def relocate(images: Images, shards: str | Sequence[str] | None) -> Images:
    """Return the images with the present places of their shards. Raises UserError if one is missing or has changed."""
    paths = images.paths
    if shards is not None:
        given = expand_shards(shards)
        found = {p.name: p.resolve() for p in given}
        if len(found) == len(given):
            missing = [p.name for p in paths if p.name not in found]
            if missing:
                raise UserError(f"--shards does not give {missing[0]}, which the cache was made from")
            paths = tuple(found[p.name] for p in paths)
        elif len(given) == len(paths):  # names repeat, so the order counts
            paths = tuple(p.resolve() for p in given)
        else:
            raise UserError(f"--shards gives {len(given)} shards with repeated names; the cache has {len(paths)}")
    for path, size in zip(paths, images.shard_sizes, strict=True):
        if not path.is_file():
            raise UserError(f"shard {path} of the cache is gone; if it has moved, give its place with --shards")
        if path.stat().st_size != size:
            raise UserError(f"shard {path} has changed since it was cached; cache it again")
    return replace(images, paths=paths)
