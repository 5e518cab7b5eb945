"""What an `--append` adds: the parts that lack between what a cache holds and what is wanted of it.

Wanted are all given images, in all wanted views, with all wanted blocks of the given teacher; what is there already
is not computed again. New blocks and new teachers cover the records of earlier parts as they are; new images and new
views become records of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.cache.format import Index, read_index
from pipeline.cache.parts import Part
from pipeline.shards import Survey
from singer.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Images, and which of their views."""

    images: Survey
    first_view: int
    views: int


@dataclass(frozen=True)
class Addition:
    """A part to be: blocks for the records of an earlier part (`index`, with its `views`), or for new rows."""

    blocks: tuple[int, ...]
    rows: Rows | None = None
    index: Index | None = None
    views: dict[str, Any] | None = None


def plan_additions(
    parts: Sequence[Part], mine: Sequence[Part], found: Survey, views: int, blocks: Sequence[int]
) -> list[Addition]:
    """parts: all of the cache; mine: those of the given teacher; found: the given images; views: how many of each.

    Raises UserError if images of an earlier part have changed or are given in part only.
    """
    blocks = tuple(sorted({*blocks, *(b for p in mine for b in p.manifest.blocks)}))
    held: dict[str, set[int]] = {}
    for part in mine:
        held.setdefault(part.manifest.rows(), set()).update(part.manifest.blocks)
    spans: dict[str, Part] = {}
    for part in parts:
        spans.setdefault(part.manifest.rows(), part)

    number = {key: i for i, key in enumerate(found.images.keys)}
    new = np.ones(len(found.images), dtype=bool)
    additions: list[Addition] = []
    seen: dict[str, tuple[Survey, int]] = {}
    for rows, part in spans.items():
        manifest, index = part.manifest, read_index(part.store)
        missing = tuple(b for b in blocks if b not in held.get(rows, ()))
        given = np.array([number.get(key, -1) for key in index.images.keys])
        if (given < 0).all():
            if missing and rows in held:
                raise UserError(f"block {missing[0]} must be added for all images; --shards gives none of {_of(part)}")
            continue
        if (given < 0).any():
            key = index.images.keys[int(np.argmin(given))]
            raise UserError(f"--shards gives some of the images of {_of(part)} but not {key!r}; give all or none")
        images = found.select(given)
        changed = np.flatnonzero(images.digest != index.digest)
        if len(changed):
            raise UserError(f"image {index.images.keys[int(changed[0])]!r} has changed since it was cached")
        new[given] = False
        if missing:
            moved = replace(index, images=images.images)
            additions.append(Addition(missing, index=moved, views=manifest.views))
        end = manifest.views["first"] + manifest.views["count"]
        seen[manifest.data.hash] = images, max(end, seen.get(manifest.data.hash, (images, 0))[1])
    for images, end in seen.values():
        if end < views:
            additions.append(Addition(blocks, Rows(images, end, views - end)))
    if new.any():
        ends = [p.manifest.views["first"] + p.manifest.views["count"] for p in parts]
        additions.append(Addition(blocks, Rows(found.select(np.flatnonzero(new)), 0, max(views, *ends))))
    return additions


def _of(part: Part) -> str:
    shards = part.manifest.data.shards
    return shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"
