"""What must not change when a run is continued: the keys of the configuration that its result depends on.

Until a stage has stored something that depends on them, --resume takes other values, too.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch

import yaml

from pipeline.config import Config, left_open, meta, read_dumped
from pipeline.storage.base import Store
from singer.errors import UserError

CONFIG = "config.yaml"
# Files that tell how far a stage has come. The rooms above, which write them, have these names from here.
CACHE_MANIFEST, REFINER_MANIFEST, RUN_RESULT = "manifest.json", "refiner.json", "run.json"
TRAINING_CHECKPOINT, STUDENT_FOLDER = "checkpoint.pt", "student"
# How names of files begin that refine stores for each group of blocks, while and after it fits their adapters.
FIT_CHECKPOINT, FITTED = "checkpoint-", "fitted-"
# The sections, or keys, of the configuration that each stage's result depends on; None: the stage does not resume.
RESULT_SECTIONS: dict[str, tuple[str, ...] | None] = {
    "prepare": None,
    "cache-teacher": ("data", "teacher", "views", "cache"),
    "refine": ("refine",),
    "distill": ("student", "distill"),
    "finetune": ("finetune",),
    "inspect": None,
    "export": None,
    "demo": None,
    "run": ("prepare", "data", "teacher", "views", "cache", "refine", "student", "distill", "evaluate", "export"),
    "sweep": (),  # each of its runs is checked by itself, and runs may be added
}
# Files of a stage that depend on its settings: until there is one of them, --resume takes other settings, too.
_BOUND = {
    "cache-teacher": (CACHE_MANIFEST,),
    "refine": (f"{FIT_CHECKPOINT}*.pt", f"{FITTED}*", REFINER_MANIFEST),
    "distill": (TRAINING_CHECKPOINT, f"{STUDENT_FOLDER}/*", RUN_RESULT),
    "finetune": (TRAINING_CHECKPOINT, f"{STUDENT_FOLDER}/*", RUN_RESULT),
}


def sections_of(stage: str, config: Config) -> tuple[str, ...]:
    """Return the sections and keys of the configuration on which what a stage stores depends."""
    sections = RESULT_SECTIONS[stage] or ()
    if stage == "distill" and config.distill.joint:
        return (*sections, "refine")
    if stage == "finetune" and config.finetune.head == "probe":
        return (*sections, "evaluate.strengths", "evaluate.seed", "evaluate.precision")
    return sections


def is_bound(stage: str, present: Iterable[str], folder: str = "") -> bool:
    """Return whether some of the files, below a folder of them, depends on the settings of a stage that wrote them."""
    files = [name.removeprefix(folder) for name in present if name.startswith(folder)]
    return stage not in _BOUND or any(fnmatch(name, pattern) for name in files for pattern in _BOUND[stage])


def config_change(store: Store, config: Config, sections: Sequence[str]) -> str | None:
    """Describe a change in these sections or keys since the run in `store` began: "distill.lr 0.1, not 0.2".

    Returns None if nothing that affects the result has changed. Raises UserError if its configuration is damaged.
    """
    try:
        before = read_dumped(store.read(CONFIG))
        pairs = [
            (s, k, before[s].get(k, v), v)
            for s, _, only in (name.partition(".") for name in sections)
            for k, v in config.model_dump(mode="json")[s].items()
            if only in ("", k)
        ]
    except FileNotFoundError:
        return None  # the run died before it wrote anything
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{store.url} cannot be continued: its {CONFIG} is damaged; use --overwrite") from None
    for section, key, there, here in pairs:
        given = getattr(config, section)
        # The stage asks again when it knows what "auto" is here.
        if meta(type(given), key).affects == "result" and there != here and not left_open(given, key):
            return f"{section}.{key} {there}, not {here}"
    return None
