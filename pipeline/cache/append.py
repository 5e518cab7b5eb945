"""Plan what `--append` adds: the segments that a cache still needs to hold all that a run asks for.

A run asks for all given images, in all configured views, with all configured blocks of the given teacher. What the
cache holds already is not computed again. New blocks and new teachers get the records of earlier segments. New images
and new views become new records. Images are identified by their keys; a change of their content is found when they are
read, and before if they are at another place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.manifest import Manifest
from pipeline.cache.segments import Segment
from pipeline.cache.statistics import evenly_spaced
from pipeline.data import ImageFile, Images, image_digest
from pipeline.data.images import find_hashes
from pipeline.outputs.resuming import CACHE_MANIFEST
from pipeline.storage import Place
from singer.errors import UserError

# So many images that are at another place than when they were cached are compared with the cached ones.
_COMPARED = 256


@dataclass(frozen=True)
class Addition:
    """A segment that will be created: some blocks, for some views of some images.

    first_view: the number of the first view of each image; views: the number of views of each image; drawing: the
    settings by which an earlier segment drew the views, None for the settings of this run.
    """

    blocks: tuple[int, ...]
    images: Images
    first_view: int
    views: int
    drawing: dict[str, Any] | None = None


def plan_additions(
    segments: Sequence[Segment], own: Sequence[Segment], listed: Images, views: int, blocks: Sequence[int]
) -> list[Addition]:
    """Return the segments to create.

    segments: all segments of the cache, which are complete; own: those of the given teacher; listed: the given images;
    views: the number of views of each image; blocks: the wanted blocks. Raises UserError if only some images of an
    earlier segment are given, or if they have changed.
    """
    blocks = tuple(sorted({*blocks, *(b for s in own for b in s.manifest.blocks)}))
    held: dict[str, set[int]] = {}
    for segment in own:
        held.setdefault(segment.records_key, set()).update(segment.manifest.blocks)
    spans: dict[str, Segment] = {}
    for segment in segments:
        spans.setdefault(segment.records_key, segment)

    hashes = listed.keys.hashes()
    new = np.ones(len(listed), dtype=bool)
    additions: list[Addition] = []
    # {hash of images: (the images, the number after that of their last view)}.
    viewed: dict[str, tuple[Images, int]] = {}
    for rows, segment in spans.items():
        manifest, known = segment.manifest, segment.index().images
        missing = tuple(b for b in blocks if b not in held.get(rows, ()))
        given = find_hashes(hashes, known.keys.hashes())
        absent = given < 0
        if absent.all():
            if missing and rows in held:
                names = _source_names(segment)
                raise UserError(f"block {missing[0]} must be added for all images; --images gives none of {names}")
            continue
        if absent.any():
            key = known.keys[int(np.argmax(absent))]
            names = _source_names(segment)
            raise UserError(f"--images gives some of the images of {names} but not {key!r}; give all or none")
        images = listed.select(given)
        assert images.keys == known.keys, "two keys have one hash"
        _check_same(images, known, segment.index().digest)
        new[given] = False
        first, count = manifest.views["first"], manifest.views_each
        if missing:
            additions.append(Addition(missing, images, first, count, manifest.views))
        viewed[segment.hash] = images, max(first + count, viewed.get(segment.hash, (images, 0))[1])
    for images, end in viewed.values():
        if end < views:
            additions.append(Addition(blocks, images, end, views - end))
    for segment in segments:
        new[_left_out(segment, hashes, listed)] = False
    if new.any():
        ends = [s.manifest.views["first"] + s.manifest.views_each for s in segments]
        additions.append(Addition(blocks, listed.select(np.flatnonzero(new)), 0, max(views, *ends)))
    return additions


def _check_same(images: Images, known: Images, digests: np.ndarray) -> None:
    """Raise UserError unless listed images are the known ones of their keys; of those at other places, some are read.

    digests: (n,) uint64 of the known images.
    """
    numbers = {path: n for n, path in enumerate({*images.paths, *known.paths})}
    here, before = (np.array([numbers[p] for p in found.paths])[found.container] for found in (images, known))
    moved = here != before
    changed = (images.labels != known.labels) | (images.size != known.size)
    if moved.any():
        with ImageFile(images) as files:
            for n in evenly_spaced(np.flatnonzero(moved & ~changed), _COMPARED).tolist():
                changed[n] = digests[n] not in (0, image_digest(files.encoded(n)[0]))
    if changed.any():
        n = int(np.argmax(changed))
        if moved[n]:
            new, old = images.paths[images.container[n]], known.paths[known.container[n]]
            raise UserError(
                f"image {known.keys[n]!r} has changed since it was cached, or {new} has another one of this name than "
                f"{old}; then give the earlier --images, too, before the new ones, so that keys are told apart"
            )
        raise UserError(f"image {known.keys[n]!r} has changed since it was cached")


def _left_out(segment: Segment, hashes: np.ndarray, listed: Images) -> np.ndarray:
    """Return the numbers of the listed images that a segment knows to be broken: the key and the size are the same."""
    broken = segment.unreadable()
    rows = find_hashes(broken.keys.hashes(), hashes)
    known = np.flatnonzero(rows >= 0)
    same: np.ndarray = known[broken.size[rows[known]] == listed.size[known]]
    return same


def _source_names(segment: Segment) -> str:
    """Return the name of the segment's only source of images, or of its first and last one."""
    names = segment.manifest.data.shards
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def check_addition(segments: Sequence[Segment], here: Manifest, place: Place) -> None:
    """Raise UserError if what a run adds does not match what the cache holds."""
    if not segments:
        raise UserError(f"{place} has no {CACHE_MANIFEST}, so nothing can be added; start it with --resume")
    there = segments[0].manifest
    for segment in segments:
        if segment.lacks() is not None:
            raise UserError(f"{segment.store.url} is incomplete; repeat its cache-teacher command with --append first")
    same = [s.manifest for s in segments if s.manifest.teacher.identity() == here.teacher.identity()]

    def compared(m: Manifest) -> dict[str, Any]:
        # A manifest names the decoder only if it is not Pillow.
        drawing = {"decoder": "pillow", **m.views}
        views = {f"views.{k}": v for k, v in drawing.items() if k not in ("first", "count")}
        own = {"codec": m.codec, "stored_patches": m.stored_patches} if m in [*same, here] else {}
        return views | own

    for before in [there, *same[:1]]:
        for name, value in compared(before).items():
            now = compared(here).get(name, value)
            if now != value:
                raise UserError(f"{place} cannot be appended to: its {name} is {value}, this run has {now}")
