"""The folders of a chain of stages, and which settings cannot change any more in it, because of what it has stored."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from pipeline.config import Config
from pipeline.outputs.resuming import CACHE_MANIFEST, config_change, is_bound, sections_of
from pipeline.storage import Store, open_store
from singer.errors import UserError

# Folders of a chain.
CACHE, REFINER, STUDENT = "cache", "refiner", "student"
# This file of it has {step: its result}, and under GIVEN what the chain was given. A step that it lacks has not ended.
STEPS, GIVEN = "steps.json", "given"
# {folder of a chain: its stage}, each made from those before it.
_OF_CHAIN = {CACHE: "cache-teacher", REFINER: "refine", STUDENT: "distill"}
# {section: (what is made by it, its files in a chain)}.
_AFTER_TRAINING = {"evaluate": ("probes", (f"{STUDENT}/evaluate-*",)), "export": ("exports", ("timm/*", "hf/*"))}


def chain_has_begun(out: Path) -> bool:
    """Return whether `singer run` has begun to cache in `out`; until then, it may plan anew."""
    return (out / CACHE / CACHE_MANIFEST).exists()


def check_chain_settings(store: Store, config: Config, present: Iterable[str]) -> None:
    """Raise UserError if a setting on which a stage of a chain has begun has changed."""
    change = config_change(store, config, ("prepare",))
    if change is not None:
        raise UserError(
            f"{store.url} cannot be continued: it was started with {change}; repeat its command or use --overwrite"
        )
    stages = {folder: stage for folder, stage in _OF_CHAIN.items() if is_bound(stage, present, f"{folder}/")}
    if stages and CACHE not in stages:
        raise UserError(f"{store.url} has lost its cache, from which came {_places(store, stages)}; remove these, too")
    for number, (folder, stage) in enumerate(stages.items()):
        change = config_change(store, config, sections_of(stage, config))
        if change is not None:
            raise UserError(
                f"{store.url} cannot be continued: {folder} was started with {change}; repeat its command, or, to make "
                f"it anew with all that comes from it, remove {_places(store, list(stages)[number:])}"
            )
    for section, (made, patterns) in _AFTER_TRAINING.items():
        begun = any(fnmatch(name, pattern) for name in present for pattern in patterns)
        change = config_change(store, config, (section,)) if begun else None
        if change is not None:
            raise UserError(
                f"{store.url} has {made} by {change}; repeat its command, or make others with singer {section} "
                f"{store.url}/{STUDENT}"
            )


def bound_sections(out: Path, config: Config) -> set[str]:
    """Return the sections of the configuration that cannot change any more in the folder of a chain."""
    present = open_store(out).sizes()
    stages = [stage for folder, stage in _OF_CHAIN.items() if is_bound(stage, present, f"{folder}/")]
    return {section for stage in stages for section in sections_of(stage, config)}


def _places(store: Store, folders: Iterable[str]) -> str:
    return " and ".join(f"{store.url}/{folder}" for folder in folders)
