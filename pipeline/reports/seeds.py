"""Runs that differ only in their seeds are one student on the page; the page lists all other differences."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, meta, section_of
from pipeline.reports.runs import Trained
from singer.cleaners import CLEANERS

# A refiner's title contains these settings.
_IN_TITLE = ("refine.variant", "refine.cleaner", "refine.normaliser")


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Runs that differ only in their seeds."""

    name: str
    runs: tuple[Trained, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Return {section.key: value} of the settings that the runs share."""
        return _seedless(self.runs[0])


def group_runs(runs: Sequence[Trained]) -> list[SeedGroup]:
    """Group runs that differ only in their seeds; the groups are in the order of their first runs."""
    found: dict[str, list[Trained]] = {}
    for run in runs:
        labelled = run.result.finetuned.sources if run.result.finetuned is not None else None
        found.setdefault(json.dumps([_seedless(run), labelled], sort_keys=True), []).append(run)
    names = [_common_name([run.name for run in members]) for members in found.values()]
    return [
        SeedGroup(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, found.values(), strict=True)
    ]


def differences(groups: Sequence[SeedGroup]) -> dict[str, list[Any]]:
    """Return {key: value of every group} of the settings that differ; a value is None if a group does not use the key.

    The key `targets` is the refiner's title, or raw; `labels` says whether the student was fine-tuned with some. Most
    keys of the section refine are used only in the training of adapters.
    """
    firsts = [group.runs[0] for group in groups]
    titles = [run.source.title if run.source is not None else "raw" for run in firsts]
    tuned = ["none" if run.result.finetuned is None else "fine-tuned" for run in firsts]
    columns: dict[str, list[Any]] = {"targets": titles, "labels": tuned}
    for key in dict.fromkeys(key for group in groups for key in group.settings):
        if key not in _IN_TITLE:
            used = [_is_used(key, run) for run in firsts]
            columns[key] = [g.settings.get(key) if use else None for g, use in zip(groups, used, strict=True)]
    different = {key: {json.dumps(v) for v in values if v is not None} for key, values in columns.items()}
    lacking = {key: None in values and not key.startswith(("refine.", "finetune.")) for key, values in columns.items()}
    return {key: values for key, values in columns.items() if len(different[key]) + lacking[key] > 1}


def _is_used(key: str, run: Trained) -> bool:
    section, _, name = key.partition(".")
    if "trained" not in meta(section_of(Config, section), name).only:
        return True
    return run.config.distill.joint or CLEANERS[run.config.refine.cleaner].trained


def _seedless(run: Trained) -> dict[str, Any]:
    return {key: value for key, value in run.settings().items() if not key.endswith(".seed")}


def _common_name(names: list[str]) -> str:
    """Return what the names have in common: clip for clip_seed-0 and clip_seed-1."""
    if len(names) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", "".join(letters[0] for letters in same)) or names[0]
