"""Find cached images again where they are now."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.image_index import index_images
from pipeline.data.image_reading import ImageFile
from pipeline.data.images import Images, find_hashes, image_digest
from pipeline.data.sources import kind_of
from pipeline.data.specs import Spec, resolve
from singer.errors import UserError


def relocate(images: Images, spec: Spec | None) -> Images:
    """Return the images with the present places of their containers.

    spec: where they are now; None where they were. Files are also found by the keys and sizes of their images, or by
    sizes and order, as in a list whose paths were rewritten. Raises UserError if one is missing or has changed. The
    first file of a folder is checked here, the others when they are read.
    """
    if spec is None:
        return _checked(images, images.paths)
    try:
        return _checked(images, _matched(images.paths, resolve(spec)))
    except UserError:
        found = _by_key(images, spec) if images.files is not None else None
        if found is None:
            raise
        return found


def _by_key(images: Images, spec: Spec) -> Images | None:
    """Return the images at their places in what a specification lists, or None if it does not list them all."""
    try:
        listed = index_images(spec, on_error="skip")
    except UserError:
        return None
    rows = find_hashes(listed.keys.hashes(), images.keys.hashes())
    if (rows < 0).any():
        if len(listed) != len(images):
            return None
        rows = np.arange(len(images))  # keys of lists may be paths; then the order counts
    if not np.array_equal(listed.size[rows], images.size):
        return None
    found = listed.select(rows)
    places = {name: getattr(found, name) for name in ("paths", "container_sizes", "container", "offset", "files")}
    return replace(images, **places)


def _checked(images: Images, paths: tuple[Path, ...]) -> Images:
    """Return the images at other places of their containers, which must be there and unchanged."""
    firsts = np.unique(images.container, return_index=True)
    first_of = dict(zip(firsts[0].tolist(), firsts[1].tolist(), strict=True))
    for number, (path, size) in enumerate(zip(paths, images.container_sizes, strict=True)):
        if not path.exists():
            # What it was is known by whether its images are files of their own.
            word = "folder" if images.files is not None and not path.suffix else kind_of(path).word
            raise UserError(f"{word} {path} of the cache is gone; if it has moved, give its place with --images")
        if not path.is_dir():
            if path.stat().st_size != size:
                raise UserError(f"{kind_of(path).word} {path} has changed since it was cached; cache it again")
        elif number in first_of and images.files is not None:
            _check_file(path, images.files[first_of[number]], int(images.size[first_of[number]]))
    return replace(images, paths=paths)


def _check_file(folder: Path, name: str, size: int) -> None:
    file = folder / name
    if not file.is_file():
        raise UserError(
            f"{file} of the cache is gone; if it has moved, give the place of its folder, or a list that names it, "
            "with --images"
        )
    if file.stat().st_size != size:
        raise UserError(f"{file} has changed since it was cached; cache it again")


def _matched(paths: Sequence[Path], given: Sequence[Path]) -> tuple[Path, ...]:
    """Return for each container of a cache the given one: by its name, or else by its place in the order.

    A folder often has another name when it has moved.
    """
    places = [kind_of(path).container(path).resolve() for path in given]
    found = {place.name: place for place in places}
    names = {path.name for path in paths}
    if len(found) == len(places) and len(names) == len(paths) and names <= found.keys():
        return tuple(found[path.name] for path in paths)
    alike = len(places) == len(paths)
    alike &= all(place.is_dir() or place.name == path.name for place, path in zip(places, paths, strict=False))
    if alike or (len(found) < len(places) == len(paths)):
        return tuple(places)
    if len(found) < len(places):
        raise UserError(f"--images gives {len(places)} sources with repeated names; the cache has {len(paths)}")
    if len(names) < len(paths):
        raise UserError(
            f"--images gives {len(places)} sources; the cache has {len(paths)}, some of one name: give all, in order"
        )
    missing = next(path.name for path in paths if path.name not in found)
    raise UserError(f"--images does not give {missing}, which the cache was made from")


def check_images(files: ImageFile, numbers: np.ndarray, digests: np.ndarray) -> None:
    """Raise UserError naming the first of some images that is not the one that was cached.

    digests: (images,) uint64 of the cached images; an image with digest 0 is not checked.
    """
    for number in numbers.tolist():
        data, where = files.encoded(number)
        if digests[number] not in (0, image_digest(data)):
            raise UserError(f"{where} is not the one that was cached; give its place with --images")
