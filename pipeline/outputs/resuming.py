"""What must not change when a run is continued: the keys of the configuration that its result depends on."""

from collections.abc import Sequence

import yaml

from pipeline.config import Config, meta, section_of
from pipeline.storage.base import Store
from singer.errors import UserError

CONFIG = "config.yaml"
# The sections, or keys, of the configuration that each stage's result depends on; None: the stage does not resume.
RESULT_SECTIONS: dict[str, tuple[str, ...] | None] = {
    "prepare": None,
    "cache-teacher": ("teacher", "views", "cache"),
    "refine": ("refine",),
    "distill": ("student", "distill"),
    "finetune": ("finetune",),
    "inspect": None,
    "export": None,
    "demo": None,
    "run": ("prepare", "teacher", "views", "cache", "refine", "student", "distill", "evaluate", "export"),
    "sweep": (),  # each of its runs is checked by itself, and runs may be added
}


def config_change(store: Store, config: Config, sections: Sequence[str]) -> str | None:
    """Describe a change in these sections or keys since the run in `store` began: "distill.lr 0.1, not 0.2".

    Returns None if nothing that affects the result has changed. Raises UserError if its configuration is damaged.
    """
    try:
        before = yaml.safe_load(store.read(CONFIG))
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
        about = meta(section_of(config, section), key)
        # The stage asks again when it knows what "auto" is on this machine.
        if about.affects == "result" and there != here and not (about.by_machine and here == "auto"):
            return f"{section}.{key} {there}, not {here}"
    return None
