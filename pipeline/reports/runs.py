"""The runs that a report is about, and the places of their caches and refiners."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.reader import Cache
from pipeline.config import Config, keys, load_config, section_of
from pipeline.outputs.provenance import file_hash, read_inputs, read_versions
from pipeline.outputs.resuming import CONFIG
from pipeline.storage import Place
from pipeline.training.distilling.cached_teachers import cache_of_run
from pipeline.training.refining.stored_refiners import find_refiner, read_refiner
from pipeline.training.run_directory import ADAPTERS, DistillResult, TeacherLink, load_result, load_run_config
from singer.errors import UserError


@dataclass(frozen=True)
class RefinerSource:
    """A refiner that students learned from.

    folder: the refiner's folder or, with joint training, that of the run; hash: SHA-256 of its file; cleans: whether it
    has a cleaner.
    """

    title: str
    folder: Path
    joint: bool
    hash: str
    cleans: bool = True


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run.

    name: a unique name; config: the configuration of the run, with the section `refine` of its refiner.
    """

    name: str
    folder: Path
    result: DistillResult
    config: Config
    source: RefinerSource | None
    versions: dict[str, str]

    @property
    def link(self) -> TeacherLink:
        """Return what it learned from the first teacher, which a report is about."""
        return self.result.teachers[0]

    @property
    def sections(self) -> list[str]:
        """Return the sections of the configuration that affect the student."""
        used = {"refine": self.source is not None, "finetune": self.result.finetuned is not None}
        return [name for name in ("student", "distill", "refine", "finetune") if used.get(name, True)]

    def settings(self) -> dict[str, Any]:
        """Return {section.key: value} of all settings that affect the student."""
        tree = self.config.model_dump(mode="json")
        return {
            f"{section}.{name}": tree[section][name]
            for section in self.sections
            for name, about in keys(section_of(Config, section))
            if about.affects == "result"
        }


def read_runs(folders: Sequence[Path], refiners: Sequence[Path] = ()) -> list[Trained]:
    """Read the runs, each with a unique name.

    Raises UserError, with the run's name, if a run is damaged, or if its refiner is neither at its recorded place nor
    among `refiners`.
    """
    names = _names(folders)
    return [_read(folder, name, refiners) for folder, name in zip(folders, names, strict=True)]


def find_cache(runs: Sequence[Trained], given: Place | None) -> Cache:
    """Return the cache that all runs learned from.

    Raises UserError if it is not found, or if the runs learned from several caches.
    """
    first, link = runs[0], runs[0].link
    cache = Cache(given, known=link.cache) if given is not None else cache_of_run(first.folder, link)
    if cache is None:
        raise UserError(
            f"the cache that {first.folder} learned from is not at {link.cache_place}; give its place with --cache"
        )
    for run in runs:
        if run.link.cache in cache.ids:
            continue
        here = f"{run.folder} was trained from cache {run.link.cache[:12]}"
        if given is not None and run is first:
            raise UserError(f"{here}, but {given} is {cache.id[:12]}; give its own with --cache")
        raise UserError(
            f"{here}, {first.folder} from {link.cache[:12]}: a report is about one cache; make one for each"
        )
    return cache


def _names(folders: Sequence[Path]) -> list[str]:
    """Return unique names: those of the folders, or with the folder above, or else the paths as they were given."""
    places = [folder.resolve() for folder in folders]
    for last in (1, 2):
        names = ["/".join(place.parts[-last:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str, refiners: Sequence[Path]) -> Trained:
    result, config = load_result(folder), load_run_config(folder)
    source = None
    digest = read_inputs(folder).get("refiner")
    if config.distill.joint:
        source = RefinerSource("joint adapters", folder, True, file_hash(folder / ADAPTERS))
    elif digest is not None:
        source = _refiner_source(folder, result.teachers[0], digest, refiners)
        if (source.folder / CONFIG).is_file():
            config = config.model_copy(update={"refine": load_config(source.folder / CONFIG).refine})
    return Trained(name, folder, result, config, source, read_versions(folder))


def _refiner_source(run: Path, link: TeacherLink, digest: str, given: Sequence[Path]) -> RefinerSource:
    folder = find_refiner(run, link, digest, given)
    if folder is None:
        raise UserError(
            f"the refiner that {run} learned from is not at {link.refiner} any more; give its place with --refiner"
        )
    manifest = read_refiner(folder)
    kind = (manifest.cleaner, manifest.normaliser)
    title = " + ".join(part for part in kind if part != "none") or "none"
    return RefinerSource(title, folder, False, digest, kind[0] != "none")
