"""Runs that differ in seeds only are one student on the page; what else differs is told."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, meta, section_of
from pipeline.reports.runs import Trained
from singer.cleaners import CLEANERS

# A refiner's title tells these.
_TOLD = ("refine.variant", "refine.cleaner", "refine.normaliser")


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that differ in nothing but seeds."""

    name: str
    runs: tuple[Trained, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return _seedless(self.runs[0])


def group_runs(runs: Sequence[Trained]) -> list[SeedGroup]:
    """In the order of their first runs."""
    found: dict[str, list[Trained]] = {}
    for run in runs:
        found.setdefault(json.dumps(_seedless(run), sort_keys=True), []).append(run)
    names = [_common_name([run.name for run in members]) for members in found.values()]
    return [
        SeedGroup(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, found.values(), strict=True)
    ]


def differences(groups: Sequence[SeedGroup]) -> dict[str, list[Any]]:
    """{key: value of every group} of the settings that are not the same everywhere; None: it has none.

    targets: what the features were refined by, or raw. Keys of the section refine count where they were of use: most
    are about the training of adapters.
    """
    firsts = [group.runs[0] for group in groups]
    titles = [run.source.title if run.source is not None else "raw" for run in firsts]
    columns: dict[str, list[Any]] = {"targets": titles}
    for key in dict.fromkeys(key for group in groups for key in group.settings):
        if key not in _TOLD:
            useful = [_is_of_use(key, run) for run in firsts]
            columns[key] = [g.settings.get(key) if use else None for g, use in zip(groups, useful, strict=True)]
    different = {key: {json.dumps(v) for v in values if v is not None} for key, values in columns.items()}
    lacking = {key: None in values and not key.startswith("refine.") for key, values in columns.items()}
    return {key: values for key, values in columns.items() if len(different[key]) + lacking[key] > 1}


def _is_of_use(key: str, run: Trained) -> bool:
    section, _, name = key.partition(".")
    if not meta(section_of(Config, section), name).only:
        return True
    return run.config.distill.joint or CLEANERS[run.config.refine.cleaner].trained


def _seedless(run: Trained) -> dict[str, Any]:
    return {key: value for key, value in run.settings().items() if not key.endswith(".seed")}


def _common_name(names: list[str]) -> str:
    """clip_seed-0 and clip_seed-1 -> clip"""
    if len(names) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", "".join(letters[0] for letters in same)) or names[0]
