"""The shards of a chain: packed from folders, lists or a table if need be, and split into training and test."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data import Images, list_images, resolve
from pipeline.data.source_listing import NO_LABEL
from pipeline.data.sources import kind_of
from pipeline.data.sources.tables import TABLE
from pipeline.data.sources.tar import TAR
from pipeline.evaluation.classification import check
from pipeline.outputs.folder import Mode
from pipeline.stages.prepare import prepare
from singer.errors import UserError

Photos = str | Path | Sequence[str]
# The last tenth of the shards, at least one, is held out; a small folder is packed into so many shards.
_PARTS = 10
# Probes see whole shards, the first ones, up to so many images.
_LEARN, _TEST = 20_000, 10_000


@dataclass(frozen=True)
class Split:
    """What a chain learns from and is tested on, as --images takes it.

    train: shards that are cached; probe: those of them from which probes learn; test: held-out shards, none if there
    are no labels; images, probed: images in train, and in probe and test together; why: why nothing is held out.
    """

    train: list[str]
    probe: list[str]
    test: list[str]
    images: int
    probed: int
    why: str


def has_to_be_packed(photos: Photos) -> bool:
    """Return whether images are packed first: folders, lists and a single table, so that some can be held out.

    Shards and several tables are divided as they are.
    """
    paths = resolve(photos)
    kinds = [kind_of(path) for path in paths]
    return TAR not in kinds and (len(paths) == 1 or any(kind is not TABLE for kind in kinds))


def shards_of(config: Config, photos: Photos, packed: Path, mode: Mode) -> tuple[Config, list[str]]:
    """Return the shards of `photos`, as --images takes them, and the configuration that packs them.

    What has to be packed goes to the folder `packed` by singer prepare; small sets into several shards, so that some
    can be held out.
    """
    if not has_to_be_packed(photos):
        return config, [str(photos)] if isinstance(photos, str | Path) else [str(spec) for spec in photos]
    size = prepare(config, photos, packed, mode, _PARTS).shard_images
    return config.changed(prepare={"shard_images": size}), [f"{glob.escape(str(packed))}/*.tar"]


def split(config: Config, shards: Sequence[str]) -> Split:
    """Split shards into those to learn from and the last tenth, which is held out if all images have labels."""
    paths = resolve(shards)
    listed = list_images(config, shards)
    held = max(1, len(paths) // _PARTS)
    counts, kept = np.bincount(listed.container, minlength=len(paths)), len(paths) - held
    why = _why_not(config, listed, kept)
    if why:
        return Split(ranges(paths), [], [], len(listed), 0, why)
    learn, test = _first(counts[:kept], _LEARN), kept + _first(counts[kept:], _TEST)
    probed = int(counts[:learn].sum() + counts[kept:test].sum())
    train, probe, tested = (ranges(paths[part]) for part in (slice(kept), slice(learn), slice(kept, test)))
    return Split(train, probe, tested, int(counts[:kept].sum()), probed, "")


def _why_not(config: Config, listed: Images, train: int) -> str:
    """Return why no probe can learn from the first `train` shards and be tested on the others; "" if one can."""
    if (listed.labels == NO_LABEL).all():
        return "the images have no labels"
    if not train:
        return "there is one shard only, and nothing can be held out"
    first, last = (
        listed.select(np.flatnonzero(part)) for part in (listed.container < train, listed.container >= train)
    )
    if not len(first) or not len(last):
        return "shards without images cannot be held out"
    try:
        check(first, last, config.evaluate)
    except UserError as error:
        return str(error)
    return ""


def _first(counts: np.ndarray, most: int) -> int:
    """Return how many of the shards with so many images hold at most `most` images, at least one."""
    return max(1, int(np.searchsorted(np.cumsum(counts), most, side="right")))


def ranges(paths: Sequence[Path]) -> list[str]:
    """Return files as data.resolve takes them, in their order; numbered neighbours become one brace range."""
    runs: list[tuple[str, str, str, str]] = []
    for path in paths:
        before, number, after = _numbered(str(path))
        last = runs[-1] if runs else ("", "", "", "")
        if number and last[::3] == (before, after) and len(last[2]) == len(number) and int(number) == int(last[2]) + 1:
            runs[-1] = (before, last[1], number, after)
        else:
            runs.append((before, number, number, after))
    return [before + after if not number else _range(before, number, end, after) for before, number, end, after in runs]


def _numbered(path: str) -> tuple[str, str, str]:
    """Return the text before the last number of a file's name, the number, and the text after it.

    A name with braces of its own is taken as it is: they would look like a range.
    """
    folder, _, name = path.rpartition("/")
    found = None if "{" in name or "}" in name else re.fullmatch(r"(.*?)(\d+)(\D*)", path, re.DOTALL)
    return (found[1], found[2], found[3]) if found and len(found[1]) >= len(folder) else (path, "", "")


def _range(before: str, first: str, last: str, after: str) -> str:
    if first == last:
        return f"{before}{first}{after}"
    return f"{before}{{{first}..{last}}}{after}"
