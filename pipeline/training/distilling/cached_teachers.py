"""Open the teachers of a run: the caches of one or several teachers, each with its refiner."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import evenly_spaced
from pipeline.config import DistillConfig
from pipeline.data import ImageFile, Spec, accepted, check_images, relocate
from pipeline.outputs.provenance import file_hash
from pipeline.outputs.resuming import RUN_RESULT
from pipeline.storage import Place
from pipeline.students.start import TeacherWeights
from pipeline.training.refining.stored_refiners import REFINER, RefinerManifest, open_refined, read_refiner
from pipeline.training.run_directory import TeacherLink, load_result, nearby
from singer.errors import UserError

# A single value is for a single teacher. A list has one value for each teacher, in the order of the caches.
Places = Place | Sequence[Place]
Refiners = Path | Sequence[Path | None] | None
Value = TypeVar("Value")
# So many images that were moved are compared with the cached ones.
_COMPARED = 64


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher: its opened cache, and the refiner of its features, if any.

    name: the prefix of its losses if there are several teachers; refiner: its folder; weight: the weight of the
    teacher's objective.
    """

    name: str
    cache: Cache
    refiner: Path | None
    refiner_manifest: RefinerManifest | None
    weight: float


def open_teachers(
    settings: DistillConfig, places: Places, refiners: Refiners, started_on: Mapping[str, str | None] | None = None
) -> list[CachedTeacher]:
    """Open the teachers of a run, with the blocks of distill.blocks, or else those of their refiners.

    started_on: the input_hashes of a resumed run. Raises UserError if a cache or refiner does not exist, if a name fits
    several variants of a teacher, if a list does not have one value for each cache, or if the caches hold
    different records.
    """
    listed = as_places(places)
    count = len(listed)
    given = [refiners] if isinstance(refiners, Path) else refiners
    refiner_paths = _each("--refiner (none for raw targets)", given, count, None)
    teachers = _each("distill.teacher", settings.teachers, count, None)
    chosen = _each("distill.blocks", settings.blocks_by_teacher, count, None)
    if count == 1 and settings.teacher_drop:
        raise UserError("distill.teacher_drop is for several teachers; give as many --cache, or leave it out")
    weights = _each("distill.teacher_weights", settings.teacher_weights, count, 1 / count)
    manifests = [read_refiner(path) if path is not None else None for path in refiner_paths]
    caches = []
    for n, (place, path, teacher, blocks) in enumerate(
        zip(listed, refiner_paths, teachers, chosen, strict=True), start=1
    ):
        option = _option(teachers, n)
        if path is not None:
            caches.append(open_refined(path, place, teacher, blocks, settings.local_copies, option))
        else:
            known = (started_on or {}).get(numbered("cache", n))
            caches.append(Cache(place, teacher, blocks, settings.local_copies, known, option))
    check_records(caches)
    return [
        CachedTeacher(*fields) for fields in zip(_names(caches), caches, refiner_paths, manifests, weights, strict=True)
    ]


def as_places(places: Places) -> list[Place]:
    """Return one or several places as a list."""
    return [places] if isinstance(places, str | Path) else list(places)


def _same_views(a: Cache, b: Cache) -> bool:
    """Return whether two caches with the same rows have equal views: other versions may draw them by other rules."""
    return all(np.array_equal(getattr(a.index, name), getattr(b.index, name)) for name in ("box", "flip", "color"))


def check_records(caches: Sequence[Cache]) -> None:
    """Raise UserError, naming both sides, unless all caches hold the same views of the same images in one order."""
    first, *others = caches
    for other in others:
        if other.records_key != first.records_key or not _same_views(other, first):
            ours, theirs = (f"{c.place} ({c.manifest.teacher.architecture}, {len(c)} records)" for c in (first, other))
            raise UserError(
                f"{ours} and {theirs} do not hold the same views of the same images in the same order; "
                "cache both teachers with the same images and views, and if their inputs have other shapes, with one "
                "views.shape"
            )


def input_hashes(teachers: Sequence[CachedTeacher], share_run: Path | None) -> dict[str, str | None]:
    """Return what identifies the inputs of a run.

    {"cache": its id, "refiner": hash of the refiner's file, "refiner_kind": its kind, "cache 2": ...,
    "refiner 2": ...}. The kind is needed because refiners of different kinds may hold the same tensors. share_run: that
    of the section distill. Raises UserError if it is not finished.
    """
    hashes: dict[str, str | None] = {}
    if share_run is not None:
        load_result(share_run)
        hashes["distill.share_run"] = file_hash(share_run / RUN_RESULT)
    for number, teacher in enumerate(teachers, start=1):
        hashes[numbered("cache", number)] = teacher.cache.id
        refiner = teacher.refiner
        hashes[numbered("refiner", number)] = file_hash(refiner / REFINER) if refiner is not None else None
        manifest = teacher.refiner_manifest
        kind = f"{manifest.cleaner}, {manifest.normaliser}" if manifest is not None else None
        hashes[numbered("refiner_kind", number)] = kind
    return hashes


def _option(teachers: Sequence[str | None], number: int) -> str:
    """Return the option that names the variant of cache `number` (from 1), with {} for the name."""
    if len(teachers) == 1:
        return "--set distill.teacher={}"
    names = ["{}" if n == number else name or "null" for n, name in enumerate(teachers, start=1)]
    return f"--set 'distill.teacher=[{', '.join(names)}]'"


def numbered(name: str, number: int) -> str:
    """Append a number to a name; number 1 is left out, as if there were only one."""
    return name if number == 1 else f"{name} {number}"


def _each(key: str, values: Sequence[Value] | None, count: int, default: Value) -> Sequence[Value]:
    """Return a value for each cache. Raises UserError if `values` does not have one for each."""
    if values is None:
        return [default] * count
    if len(values) != count:
        raise UserError(f"{key}: {len(values)} given for {count} --cache; give one for each, in the same order")
    return values


def _names(caches: Sequence[Cache]) -> list[str]:
    """Return the teachers' architectures, numbered where they are the same."""
    names = [cache.manifest.teacher.architecture for cache in caches]
    counts = Counter(names)
    return [f"{name}-{n}" if counts[name] > 1 else name for n, name in enumerate(names, start=1)]


def open_images(cache: Cache, images: Spec | None = None) -> AbstractContextManager[ImageFile | None]:
    """Open the cached images where they are now; give None if the cache holds the views.

    Raises UserError like data.relocate, and if images at another place are not those that were cached, of which a
    sample is read.
    """
    if cache.has_pixels:
        return nullcontext()
    found = accepted(relocate(cache.index.images, images))
    if images is not None:
        with ImageFile(found) as files:
            check_images(files, evenly_spaced(np.arange(len(found)), _COMPARED), cache.index.digest)
    return ImageFile(found)


def cached_weights(cache: Cache, weights: Path | None) -> TeacherWeights:
    """Return where the weights of a cached teacher are. weights: a file that has them, if they moved."""
    teacher = cache.manifest.teacher
    return TeacherWeights(cache.teacher_config(weights), teacher.architecture, teacher.model_args, teacher.weights)


def cache_of_run(run: Path, link: TeacherLink) -> Cache | None:
    """Open the cache that a run learned from, at its recorded place or near the run; None if it is at neither."""
    for place in nearby(run, [link.cache_place, "cache"]):
        try:
            cache = Cache(place, known=link.cache)
        except (UserError, OSError):
            continue
        if link.cache in cache.ids:
            return cache
    return None
