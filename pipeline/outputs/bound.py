"""Which settings a stage, or a chain of stages, is bound to by what it has stored; --resume takes others until then."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from pipeline.config import Config
from pipeline.outputs.resuming import RESULT_SECTIONS, config_change
from pipeline.storage import Store, open_store
from singer.errors import UserError

# Folders of a chain.
CACHE, REFINER, STUDENT = "cache", "refiner", "student"
# Files of a stage that depend on its settings: until there is one of them, --resume takes other settings, too.
_BOUND = {
    "cache-teacher": ("manifest.json",),
    "refine": ("checkpoint-*.pt", "fitted-*", "refiner.json"),
    "distill": ("checkpoint.pt", "student/*", "run.json"),
    "finetune": ("checkpoint.pt", "student/*", "run.json"),
}
# {folder of a chain: its stage}, each made from those before it.
_OF_CHAIN = {CACHE: "cache-teacher", REFINER: "refine", STUDENT: "distill"}
# {section: (what is made by it, its files in a chain)}.
_AFTER_TRAINING = {"evaluate": ("probes", (f"{STUDENT}/evaluate-*",)), "export": ("exports", ("timm/*", "hf/*"))}


def sections_of(stage: str, config: Config) -> tuple[str, ...]:
    """Return the sections and keys of the configuration on which what a stage stores depends."""
    sections = RESULT_SECTIONS[stage] or ()
    if stage == "distill" and config.distill.joint:
        return (*sections, "refine")
    if stage == "finetune" and config.finetune.head == "probe":
        return (*sections, "evaluate.strengths", "evaluate.seed")
    return sections


def is_bound(stage: str, present: Iterable[str], folder: str = "") -> bool:
    """Return whether some of the files, below a folder of them, depends on the settings of a stage that wrote them."""
    files = [name.removeprefix(folder) for name in present if name.startswith(folder)]
    return stage not in _BOUND or any(fnmatch(name, pattern) for name in files for pattern in _BOUND[stage])


def chain_has_begun(out: Path) -> bool:
    """Return whether `singer run` has begun to cache in `out`; until then, it may plan anew."""
    return (out / CACHE / "manifest.json").exists()


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
