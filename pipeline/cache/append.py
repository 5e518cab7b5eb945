"""What an `--append` adds: the parts that lack between what a cache holds and what is wanted of it.

Wanted are all given images, in all wanted views, with all wanted blocks of the given teacher; what is there already
is not computed again. New blocks and new teachers cover the records of earlier parts as they are; new images and new
views become records of their own. Images are known by their keys; whether they have changed since is seen when they are
read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.cache.format import MANIFEST
from pipeline.cache.manifest import Manifest
from pipeline.cache.segments import Segment
from pipeline.data import Images
from pipeline.storage import Place
from singer.errors import UserError


@dataclass(frozen=True)
class Addition:
    """A part to be: blocks for views of images.

    first_view, views: numbers of the views of each image; drawing: settings of an earlier part that drew them, None
    for those of this run.
    """

    blocks: tuple[int, ...]
    images: Images
    first_view: int
    views: int
    drawing: dict[str, Any] | None = None


def plan_additions(
    parts: Sequence[Segment], mine: Sequence[Segment], listed: Images, views: int, blocks: Sequence[int]
) -> list[Addition]:
    """parts: all of the cache, complete; mine: those of the given teacher; listed: the given images; views: of each.

    Raises UserError if images of an earlier part are given in part only, or differ from what they were.
    """
    blocks = tuple(sorted({*blocks, *(b for p in mine for b in p.manifest.blocks)}))
    held: dict[str, set[int]] = {}
    for part in mine:
        held.setdefault(part.rows, set()).update(part.manifest.blocks)
    spans: dict[str, Segment] = {}
    for part in parts:
        spans.setdefault(part.rows, part)

    hashes = listed.keys.hashes()
    order = np.argsort(hashes)
    new = np.ones(len(listed), dtype=bool)
    additions: list[Addition] = []
    seen: dict[str, tuple[Images, int]] = {}
    for rows, part in spans.items():
        manifest, known = part.manifest, part.index().images
        missing = tuple(b for b in blocks if b not in held.get(rows, ()))
        wanted = known.keys.hashes()
        place = np.minimum(np.searchsorted(hashes[order], wanted), len(order) - 1)
        given = order[place]
        absent = hashes[given] != wanted
        if absent.all():
            if missing and rows in held:
                raise UserError(f"block {missing[0]} must be added for all images; --shards gives none of {_of(part)}")
            continue
        if absent.any():
            key = known.keys[int(np.argmax(absent))]
            raise UserError(f"--shards gives some of the images of {_of(part)} but not {key!r}; give all or none")
        images = listed.select(given)
        assert images.keys == known.keys, "two keys have one hash"
        for name in ("labels", "size"):
            changed = np.flatnonzero(getattr(images, name) != getattr(known, name))
            if len(changed):
                raise UserError(f"image {known.keys[int(changed[0])]!r} has changed since it was cached")
        new[given] = False
        first, count = manifest.views["first"], manifest.views_each
        if missing:
            additions.append(Addition(missing, images, first, count, manifest.views))
        seen[part.hash] = images, max(first + count, seen.get(part.hash, (images, 0))[1])
    for images, end in seen.values():
        if end < views:
            additions.append(Addition(blocks, images, end, views - end))
    for part in parts:
        new[_left_out(part, hashes, listed)] = False
    if new.any():
        ends = [p.manifest.views["first"] + p.manifest.views_each for p in parts]
        additions.append(Addition(blocks, listed.select(np.flatnonzero(new)), 0, max(views, *ends)))
    return additions


def _left_out(part: Segment, hashes: np.ndarray, listed: Images) -> np.ndarray:
    """Which of the listed images, by number, a part knows to be broken: of the same key and size."""
    broken = part.unreadable()
    order = np.argsort(broken_hashes := broken.keys.hashes())
    if not len(order):
        return order
    place = order[np.minimum(np.searchsorted(broken_hashes[order], hashes), len(order) - 1)]
    same = (broken_hashes[place] == hashes) & (broken.size[place] == listed.size)
    return np.flatnonzero(same)


def _of(part: Segment) -> str:
    shards = part.manifest.data.shards
    return shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"


def check_growth(parts: Sequence[Segment], here: Manifest, place: Place) -> None:
    """Raise UserError if what is to be added does not go together with what is there."""
    if not parts:
        raise UserError(f"{place} has no {MANIFEST}: nothing can be added; begin it with --resume")
    there = parts[0].manifest
    if there.version == 2:
        raise UserError(f"{place} was written by format version 2 and cannot grow; make a new cache")
    for part in parts:
        if part.lacks() is not None:
            raise UserError(f"{part.store.url} is incomplete; repeat its cache-teacher command with --append first")
    same = [p.manifest for p in parts if p.manifest.teacher.identity() == here.teacher.identity()]

    def compared(m: Manifest) -> dict[str, Any]:
        views = {f"views.{k}": v for k, v in m.views.items() if k not in ("first", "count")}
        own = (
            {"codec": m.codec, "stored_patches": m.stored_patches, "lossless": m.lossless} if m in [*same, here] else {}
        )
        return views | own

    for before in [there, *same[:1]]:
        for name, value in compared(before).items():
            now = compared(here).get(name, value)
            if now != value:
                raise UserError(f"{place} cannot grow: its {name} is {value}, this run has {now}")
