"""Open stored refiners, and check what they were fitted to and whether they belong to a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from pipeline.cache.reader import Cache
from pipeline.cache.statistics import spec_of
from pipeline.config import LocalCopy, RefineConfig
from pipeline.outputs.provenance import file_hash
from pipeline.outputs.resuming import REFINER_MANIFEST
from pipeline.storage import Place
from pipeline.storage.json_files import read_as
from pipeline.storage.tensors import read_tensors
from pipeline.training.run_directory import RefinerKind, TeacherLink, nearby
from singer.artifacts import BlockScale
from singer.cleaners import CLEANERS
from singer.errors import UserError, require_known
from singer.normalisers import NORMALISERS
from singer.refiner import Refiner

# The option that names one of several variants of a teacher.
OPTION = "--set refine.teacher={}"
REFINER = "refiner.safetensors"
METRICS = "metrics.json"


@dataclass(frozen=True)
class RefinerManifest:
    """What a stored refiner is, and what it was fitted to.

    cache: the id of the cache; teacher: the hash of the teacher's weights; variant: the teacher's variant; ranks:
    {block: rank of its adapter}; scales: {block: its norms}; seed, holdout: they determine the records on which the
    refiner was not fitted.
    """

    cache: str
    cleaner: str
    normaliser: str
    ranks: dict[int, Annotated[int, Field(ge=1)]]
    scales: dict[int, BlockScale]
    teacher: str
    seed: int
    holdout: float
    variant: str

    @property
    def kind(self) -> RefinerKind:
        """Return the kind of the refiner, as runs note it."""
        return RefinerKind(self.cleaner, self.normaliser)


def empty_refiner(cache: Cache, settings: RefineConfig, ranks: Mapping[int, int]) -> Refiner:
    """Build a refiner for a cache's blocks that is not fitted yet. ranks: {block: rank of its adapter}."""
    specs = {b: spec_of(cache, b, ranks[b], settings.softness) for b in cache.blocks}
    return Refiner(specs, settings.cleaner, settings.normaliser)


def open_refined(
    path: Path,
    place: Place,
    teacher: str | None,
    blocks: Sequence[int] | None,
    local_copy: LocalCopy | None,
    option: str,
) -> Cache:
    """Open the cache of a refiner, with the variant to which it was fitted.

    Without `blocks`, the refiner's blocks are opened. The arguments after `path` are those of Cache. Raises UserError
    if the refiner was fitted to another cache.
    """
    manifest = read_refiner(path)
    try:
        return Cache(place, teacher, blocks or tuple(manifest.scales), local_copy, manifest.cache, option)
    except UserError:
        # The message that blocks are missing would mislead if the refiner was fitted to another teacher.
        check_belongs(path, manifest, Cache(place, teacher, None, local_copy, manifest.cache, option))
        raise


def check_belongs(path: Path, manifest: RefinerManifest, cache: Cache) -> None:
    """Raise UserError if the refiner at `path` was fitted to another cache.

    A cache to which segments were appended since is still the same, because its earlier segments have not changed.
    """
    variant = cache.manifest.teacher.variant
    if manifest.variant != variant:
        raise UserError(
            f"{path} was fitted to features of {manifest.variant}, but those of {cache.place} are of {variant}; "
            f"fit one to them with singer refine --set refine.teacher={variant}"
        )
    if manifest.cache not in cache.ids:
        raise UserError(
            f"{path} was fitted to cache {manifest.cache[:12]}, but {cache.place} is {cache.id[:12]}; "
            "run singer refine on this cache"
        )


def load_refiner(path: Path, cache: Cache) -> Refiner:
    """Load the refiner at `path`, frozen. Raises UserError if it was fitted to another cache or to other blocks."""
    manifest = read_refiner(path)
    check_belongs(path, manifest, cache)
    if not set(cache.blocks) <= set(manifest.scales):
        raise UserError(f"{path} was fitted to blocks {[*manifest.scales]}, not to {[*cache.blocks]}")
    settings = RefineConfig(cleaner=manifest.cleaner, normaliser=manifest.normaliser)
    require_known("refine.cleaner", manifest.cleaner, CLEANERS)
    require_known("refine.normaliser", manifest.normaliser, NORMALISERS)
    try:
        refiner = empty_refiner(cache, settings, manifest.ranks)
        state = read_tensors(path / REFINER)
        unused = tuple(f".{b}." for b in manifest.scales if b not in cache.blocks)
        refiner.load_state_dict({n: t for n, t in state.items() if not any(u in n for u in unused)})
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path / REFINER} is damaged: {str(error).splitlines()[0]}") from None
    return refiner.requires_grad_(False)


def read_refiner(path: Path) -> RefinerManifest:
    """Read the manifest of a refiner. Raises UserError if there is no finished refiner at `path`."""
    return read_as(path / REFINER_MANIFEST, RefinerManifest, "finished refiner")


def find_refiner(run: Path, link: TeacherLink, digest: str, given: Sequence[Path] = ()) -> Path | None:
    """Return the folder of the refiner that a run learned from with a teacher, None if it is not found.

    It is looked for among `given`, at its recorded place and near the run. digest: the hash of its file.
    """
    for place in [*given, *nearby(run, filter(None, [link.refiner]))]:
        folder = Path(place)
        if (
            not ((folder / REFINER_MANIFEST).is_file() and (folder / REFINER).is_file())
            or file_hash(folder / REFINER) != digest
        ):
            continue
        # Two refiners in closed form may have the same tensors.
        if read_refiner(folder).kind == link.refiner_kind:
            return folder
    return None


def split_records(cache: Cache, settings: RefineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (records to fit on, held-out records), a random split of the images that depends only on the seed.

    Raises UserError if there are too few images.
    """
    image = cache.index.first_image
    images = np.random.default_rng([settings.seed, 0]).permutation(np.unique(image))
    held_out = max(1, round(settings.holdout * len(images)))
    if len(images) == held_out:
        raise UserError(
            f"{cache.place} has views of {len(images)} images: too few to fit on some and measure on others; cache "
            "more, or lower refine.holdout"
        )
    held = np.isin(image, images[:held_out])
    return np.flatnonzero(~held), np.flatnonzero(held)
