"""The images of shards, folders, lists and tables: where they are, with what is wrong with them.

The order of training is singer's own, so images are read by position, not streamed. Every defect is raised or listed.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.config import Config
from pipeline.data.image_keys import distinct_names
from pipeline.data.images import Images, Keys, Skipped, join_classes, numbered_as
from pipeline.data.source_listing import SourceListing
from pipeline.data.sources import Options, kind_of
from pipeline.data.specs import Spec, resolve
from pipeline.data.tars import UNSAFE
from pipeline.data.walk import as_text, printable
from pipeline.runtime.progress import meter, say
from singer.errors import UserError

OnError = Literal["fail", "skip"]
# With this many sources or more, starting processes takes less time than they save.
_MANY_SOURCES = 64
_SOURCES_AT_ONCE = 4


@dataclass
class Defects:
    """Collects defects: raises UserError at the first one, or lists all."""

    on_error: OnError
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, path: Path, key: str, reason: str) -> None:
        """Raise UserError for a defect, or list it."""
        # These are printed and stored, so they must be harmless.
        key = key.encode("unicode_escape").decode() if UNSAFE.search(key) else key
        reason = printable(reason)
        if self.on_error == "fail":
            where = Skipped(printable(path), key, reason)
            raise UserError(f"{where}; repair it, or leave it out with --on-error skip")
        self.skipped.append(Skipped(path.name, key, reason))


def index_images(spec: Spec, on_error: OnError = "fail", image_key: str | None = None, seed: int = 0) -> Images:
    """List the images of what a specification names, see specs.resolve; of tars, only headers and labels are read.

    A defect is a damaged archive or an unusable sample: without an image, an empty image, a file that is missing, a
    label that is not a class number, a link in place of a file, a key that is unsafe as a path or that occurs twice in
    a source (the first one counts). The samples before the damage of a shard stay, without those that may have lost
    members. As in the webdataset library, files with a name that has no extension or begins with a dot belong to no
    sample. A key that an earlier source has, too, gets the name of its source as prefix. image_key, seed: see
    sources.Options.

    Raises UserError for a source that is missing, if there are no images at all, and for the first defect unless
    on_error is "skip"; then defects are listed in `skipped`.
    """
    paths = resolve(spec)
    listings = _list_all(paths, Options(image_key, seed))
    usable = np.concatenate([listing.usable for listing in listings])
    keys = Keys.join([Keys(listing.key_text, listing.key_ends) for listing in listings])
    starts = np.cumsum([0, *(len(listing.usable) for listing in listings)])
    source = np.repeat(np.arange(len(paths), dtype=np.int32), np.diff(starts))
    hashes = np.concatenate([listing.hashes for listing in listings])
    keys, twice = told_apart(keys, hashes, usable, source, paths)
    found = [(s, *defect) for s, listing in enumerate(listings) for defect in listing.defects]
    for row in np.flatnonzero(twice).tolist():
        s = int(source[row])
        found.append((s, row - int(starts[s]), keys[row], "occurs twice"))
    defects = Defects(on_error)
    for s, _, key, reason in sorted(found, key=lambda f: f[:2]):
        defects.add(paths[s], key, reason)
    rows, left_out = np.flatnonzero(usable & ~twice), _left_out(listings)
    if not len(rows):
        also = f"; the first defect: {defects.skipped[0]}" if defects.skipped else ""
        also += f"; there are only {as_text(left_out)}" if left_out else ""
        where = f"{len(paths)} sources, the first of them {paths[0]}" if len(paths) > 1 else str(paths[0])
        raise UserError(f"no images in {where}{also}")
    if left_out:
        say(f"left out: {as_text(left_out)}")
    labels, classes = join_classes([(listing.labels, listing.classes) for listing in listings], paths)
    images = Images(
        tuple(kind_of(path).container(path).resolve() for path in paths),
        tuple(listing.size for listing in listings),
        keys,
        labels,
        source,
        np.concatenate([listing.offsets for listing in listings]),
        np.concatenate([listing.sizes for listing in listings]),
        tuple(defects.skipped),
        files=_files(listings),
        classes=classes,
        left_out=left_out,
        given=tuple(path.resolve() for path in paths),
    )
    return images if len(rows) == len(images) else images.select(rows)


def list_images(config: Config, spec: Spec) -> Images:
    """List images as the configuration says; those of a folder in the order in which `singer prepare` packs them."""
    listed = index_images(spec, config.data.on_error, config.data.image_key, config.prepare.seed)
    return replace(listed, max_pixels=config.data.max_pixels)


def list_probe_images(config: Config, train: Spec, test: Spec) -> tuple[Images, Images]:
    """List the images for a probe. If both name their classes, those of `test` get the numbers that `train` has."""
    learn_from, tested = list_images(config, train), list_images(config, test)
    # A map of classes is in the numbers that the test images have by themselves.
    return learn_from, tested if config.evaluate.class_map is not None else numbered_as(tested, learn_from.classes)


def _files(listings: Sequence[SourceListing]) -> Keys | None:
    """Join the names of files, "" for members of tars; None if there are only these."""
    if all(listing.files is None for listing in listings):
        return None
    each = ([""] * len(listing.usable) if listing.files is None else listing.files for listing in listings)
    return Keys.of(name for names in each for name in names)


def _left_out(listings: Sequence[SourceListing]) -> dict[str, int]:
    """Add up what sources hold besides images."""
    total: Counter[str] = Counter()
    for listing in listings:
        total.update(listing.left_out)
    return dict(total)


def _list_all(paths: Sequence[Path], options: Options) -> list[SourceListing]:
    """List sources, many of them in one process for each core, because Python reads headers on one core only."""
    cores = len(os.sched_getaffinity(0))
    pool: Executor = ThreadPoolExecutor(min(len(paths), 2 * cores))
    if len(paths) >= _MANY_SOURCES and cores > 1:
        # The processes are fresh: a fork of a process with threads may hang.
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver"))
    with pool, meter("index", len(paths), "sources") as m:
        listings = []
        for listing in pool.map(partial(_list_one, options), paths, chunksize=_SOURCES_AT_ONCE):
            listings.append(listing)
            m.advance(1)
    return listings


def _list_one(options: Options, path: Path) -> SourceListing:
    return kind_of(path).list(path, options)


def told_apart(
    keys: Keys, hashes: np.ndarray, usable: np.ndarray, source: np.ndarray, paths: Sequence[Path]
) -> tuple[Keys, np.ndarray]:
    """Return the keys, with a prefix for those that an earlier source has, too, and which of them still occur twice.

    hashes: (n,) uint64, see listed.key_hash; usable: (n,) bool; source: (n,), index into paths. The prefix is the name
    of the source, or as much of its path as tells it from the others.
    """
    first = _first_rows(keys, hashes)
    again = np.flatnonzero((first >= 0) & usable)
    other = again[source[again] != source[first[again]]]
    twice = np.zeros(len(keys), dtype=np.bool_)
    if not len(other):
        twice[again] = True
        return keys, twice
    names = distinct_names(paths)
    prefixed = {row: f"{names[int(source[row])]}/{keys[row]}" for row in other.tolist()}
    say(f"{len(other)} keys are in several sources; later ones get a prefix, such as {next(iter(prefixed.values()))!r}")
    keys = Keys.of(prefixed.get(row, key) for row, key in enumerate(keys))
    twice[np.flatnonzero((_first_rows(keys, keys.hashes()) >= 0) & usable)] = True
    return keys, twice


def _first_rows(keys: Keys, hashes: np.ndarray) -> np.ndarray:
    """Return for each key, (n,) int64, the row at which it occurred first, or -1 for this one."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    found = np.full(len(keys), -1, dtype=np.int64)
    seen: dict[str, int] = {}
    # There is hardly ever anything to do: different keys nearly always have different hashes.
    for row in order[np.union1d(same, same + 1)].tolist():
        found[row] = seen.setdefault(keys[row], row)
    return np.where(found == np.arange(len(keys)), -1, found)


def index_beside(images: Images, extension: str) -> Images:
    """Index the files .{extension} beside the images: the same rows, with the places and sizes of these files.

    Raises UserError that names source and key if one is missing, empty, no regular file or there twice.
    """
    offset, size = np.zeros_like(images.offset), np.zeros_like(images.size)
    files = None if images.files is None else list(images.files)
    order = np.argsort(images.container, kind="stable")
    ends = np.searchsorted(images.container[order], np.arange(len(images.paths)), side="right").tolist()
    for path, start, end in zip(images.paths, [0, *ends], ends, strict=False):
        rows = order[start:end]
        keys = [images.keys[row] for row in rows.tolist()]
        names = [] if files is None else [files[row] for row in rows.tolist()]
        if not keys:
            continue
        found, offset[rows], size[rows] = kind_of(path).beside(path, extension, keys, names, images.offset[rows])
        for row, name in zip(rows.tolist(), found or (), strict=False):
            assert files is not None
            files[row] = name
    return replace(images, offset=offset, size=size, files=None if files is None else Keys.of(files))
