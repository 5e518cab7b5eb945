"""Find cached images again where they are now."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.images import Images
from pipeline.data.sources import kind_of
from pipeline.data.specs import Spec, resolve
from singer.errors import UserError


def relocate(images: Images, spec: Spec | None) -> Images:
    """Return the images with the present places of their containers.

    Raises UserError if one is missing or has changed. The first file of a folder is checked here,
    the others when they are read.
    """
    paths = images.paths if spec is None else _matched(images.paths, resolve(spec))
    firsts = np.unique(images.container, return_index=True)
    first_of = dict(zip(firsts[0].tolist(), firsts[1].tolist(), strict=True))
    for number, (path, size) in enumerate(zip(paths, images.container_sizes, strict=True)):
        word = kind_of(images.paths[number]).word if images.paths[number].exists() else kind_of(path).word
        if not path.exists():
            raise UserError(f"{word} {path} of the cache is gone; if it has moved, give its place with --images")
        if not path.is_dir():
            if path.stat().st_size != size:
                raise UserError(f"{word} {path} has changed since it was cached; cache it again")
        elif number in first_of and images.files is not None:
            _check_file(path, images.files[first_of[number]], int(images.size[first_of[number]]))
    return replace(images, paths=paths)


def _check_file(folder: Path, name: str, size: int) -> None:
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file} of the cache is gone; if it has moved, give the place of its folder with --images")
    if file.stat().st_size != size:
        raise UserError(f"{file} has changed since it was cached; cache it again")


def _matched(paths: Sequence[Path], given: Sequence[Path]) -> tuple[Path, ...]:
    """Return for each container of a cache the given one: by its name, or else by its place in the order.

    A folder often has another name when it has moved.
    """
    places = [kind_of(path).container(path).resolve() for path in given]
    found = {place.name: place for place in places}
    if len(found) == len(places) and all(path.name in found for path in paths):
        return tuple(found[path.name] for path in paths)
    alike = len(places) == len(paths)
    alike &= all(place.is_dir() or place.name == path.name for place, path in zip(places, paths, strict=False))
    if alike or (len(found) < len(places) == len(paths)):
        return tuple(places)
    if len(found) < len(places):
        raise UserError(f"--images gives {len(places)} sources with repeated names; the cache has {len(paths)}")
    missing = next(path.name for path in paths if path.name not in found)
    raise UserError(f"--images does not give {missing}, which the cache was made from")
