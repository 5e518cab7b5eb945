"""A sweep's file -> its runs: each with a name and a resolved configuration, and the refiners that they share.

base: a recipe's name, or a tree of configuration. grid: {key: values}, of which every combination is taken.
runs: a list of {name, set: {key: value}}; with a grid beside it, each of them is repeated at every point of the grid.
Keys are those of the configuration, and `refiner`: fit, or none for raw targets.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import Config, Positive, Section, load_config, recipes, resource
from pipeline.evaluation.figures import DEFAULT_FIGURE, figures_of
from singer.errors import UserError

# What may vary while the cache stays the same.
SECTIONS = ("refine", "student", "distill", "evaluate")
REFINER = "refiner"
_LONGEST = 80

Value = Any
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=_LONGEST)]
# Students have no head of their own.
Known = Literal["classification", "segmentation", "depth", "retrieval", "domain-shift"]


class RunEntry(Section):
    """A run of the list. Without a name it is called after what it sets."""

    name: Name | None = None
    set: dict[str, Value] = Field(default_factory=dict)


class SweepFile(Section):
    base: Any = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)
    runs: tuple[RunEntry, ...] = ()
    probes: Annotated[tuple[Known, ...], Field(min_length=1)] = ("classification",)
    rank_by: str | None = None
    # Students that train on one pass over the data, where seeds, batches and epochs let them.
    together: Positive = 1


@dataclass(frozen=True)
class Run:
    """A student to train. label: its name without seeds; changes: the keys that the file sets, as resolved.

    refiner: which of the sweep's; None for raw targets and for adapters that are trained with the student.
    """

    name: str
    label: str
    changes: dict[str, Value]
    config: Config
    refiner: str | None

    def settings(self) -> dict[str, Value]:
        """{key: value} of everything that the run's figures depend on."""
        return _settings(self.config, self.refiner is not None)


@dataclass(frozen=True)
class Plan:
    """refiners: {name: its configuration}. rank_by: task and place in its result, joined by dots."""

    base: Config
    runs: tuple[Run, ...]
    refiners: dict[str, Config]
    probes: tuple[str, ...]
    rank_by: str
    together: int = 1


def find_sweep(file: str | Path) -> Path:
    """A file, or a bundled one by its name. Raises UserError if there is neither."""
    bundled = resource("configs") / "sweeps"
    for path in (Path(file), bundled / f"{file}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml")))
    raise UserError(f"{file}: no such file, nor a bundled sweep among {known}")


def read_plan(path: Path) -> Plan:
    """Raises UserError, in one line, for whatever is wrong in the file."""
    try:
        return make_plan(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def make_plan(tree: Any) -> Plan:
    """The plan of a file's content. Raises UserError."""
    try:
        file = SweepFile.model_validate(tree or {})
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None
    if not file.grid and not file.runs:
        raise UserError("it has neither grid nor runs; give one of them, or both")
    base = _base(file.base)
    drafts = [_draft(entry, point, base) for entry in file.runs or (RunEntry(),) for point in _points(file.grid)]
    runs, refiners = _named(drafts)
    _check_different(file.runs, runs)
    probes = tuple(dict.fromkeys(file.probes))
    return Plan(
        load_config(base),
        tuple(runs),
        refiners,
        probes,
        _rank_by(file.rank_by, figures_of(probes)),
        file.together,
    )


@dataclass(frozen=True)
class _Draft:
    """A run without a name. own: keys that its name tells of, beside the one it was given."""

    given: str | None
    own: tuple[str, ...]
    changes: dict[str, Value]
    config: Config
    fitted: bool


def _base(base: Any) -> str | dict[str, Any]:
    """The recipe, or a tree like one."""
    if isinstance(base, str):
        if base not in recipes() and not Path(base).is_file():
            raise UserError(f"base: no file {base}, nor a recipe among {', '.join(recipes())}")
        return base
    if not isinstance(base, dict) or not all(isinstance(keys, dict | None) for keys in base.values()):
        raise UserError("base takes a recipe's name, or sections with keys")
    return base


def _setting(key: str, value: Value) -> str:
    """JSON is YAML too, and has no form for what is neither."""
    return f"{key}={json.dumps(value, default=str)}"


def _points(grid: Mapping[str, list[Value]]) -> Iterable[dict[str, Value]]:
    return (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _draft(entry: RunEntry, point: dict[str, Value], base: str | dict[str, Any]) -> _Draft:
    twice = sorted(set(entry.set) & set(point))
    if twice:
        raise UserError(f"{twice[0]} is set by grid and by {entry.name or 'a run'}; leave one out")
    changes = {**entry.set, **point}
    for key in changes:
        _check_key(key)
    refiner = changes.pop(REFINER, "fit")
    if refiner not in ("none", "fit", None):
        raise UserError(f"{REFINER} is none or fit, not {refiner!r}")
    config = load_config(base, [_setting(key, value) for key, value in changes.items()])
    resolved = {key: _at(config, key) for key in changes}
    if REFINER in entry.set or REFINER in point:
        resolved[REFINER] = refiner or "none"
    # Joint training has adapters of its own.
    fitted = refiner == "fit" and not config.distill.joint
    own = [*(() if entry.name else entry.set), *point]
    return _Draft(entry.name, tuple(own), resolved, config, fitted)


def _check_key(key: str) -> None:
    section, dot, _ = key.partition(".")
    if key == REFINER or (dot and (section in SECTIONS or section not in Config.model_fields)):
        return  # keys that do not exist are left to the configuration, which knows the nearest
    if dot:
        raise UserError(f"{key} belongs to the cache, and a sweep has one; it varies {', '.join(SECTIONS)}")
    ends = {REFINER: REFINER, **{k: f"{s}.{k}" for s in SECTIONS for k in getattr(Config(), s).model_dump()}}
    (near,) = difflib.get_close_matches(key, ends, n=1, cutoff=0)
    raise UserError(f"unknown key {key!r}; did you mean {ends[near]!r}?")


def _at(config: Config, key: str) -> Value:
    section, _, name = key.partition(".")
    return config.model_dump(mode="json")[section][name]


def _settings(config: Config, fitted: bool) -> dict[str, Value]:
    tree = config.model_dump(mode="json")
    sections = [s for s in SECTIONS if s != "refine" or fitted or config.distill.joint]
    return {REFINER: "fit" if fitted else "none", **{f"{s}.{k}": v for s in sections for k, v in tree[s].items()}}


def _named(drafts: list[_Draft]) -> tuple[list[Run], dict[str, Config]]:
    """Runs and refiners with names that depend on nothing but what they are, and on which keys the file sets."""
    keys = {key for draft in drafts for key in draft.changes}
    ends = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}

    def name(draft: _Draft, seeds: bool) -> str:
        own = [k for k in draft.own if seeds or not k.endswith(".seed")]
        parts = [f"{short[k]}-{_slug(draft.changes[k])}" for k in own]
        return "_".join([*filter(None, [draft.given]), *parts]) or "base"

    names = _unique([(name(d, True), d.changes) for d in drafts])
    # The first run that asks for a refiner names it.
    firsts = {_section(d): d for d in reversed(drafts) if d.fitted}
    called = dict(zip(firsts, _unique([(_refiner_name(d), s) for s, d in firsts.items()]), strict=True))
    runs = [
        Run(n, name(d, False), d.changes, d.config, called[_section(d)] if d.fitted else None)
        for n, d in zip(names, drafts, strict=True)
    ]
    return runs, {called[section]: draft.config for section, draft in firsts.items()}


def _section(draft: _Draft) -> str:
    refine, teachers = draft.config.refine.model_dump(mode="json"), draft.config.distill.teachers
    # Each cache is refined for the teacher that students learn from.
    return _key([refine, teachers] if teachers is not None else refine)


def _refiner_name(draft: _Draft) -> str:
    """Its cleaner and normaliser, and what else was set."""
    refine = draft.config.refine
    more = {k.removeprefix("refine."): v for k, v in draft.changes.items() if k.startswith("refine.")}
    parts = [f"{k}-{_slug(v)}" for k, v in more.items() if k not in ("cleaner", "normaliser")]
    return "_".join([f"{refine.cleaner}-{refine.normaliser}", *parts])


def _unique(named: list[tuple[str, Any]]) -> list[str]:
    """The names, with the beginning of a hash of their content where they are too long or not the only ones."""
    counts = Counter(name for name, _ in {(name.casefold(), _key(content)) for name, content in named})
    names = []
    for name, content in named:
        if len(name) > _LONGEST or counts[name.casefold()] > 1:
            name = f"{name[: _LONGEST - 7]}-{hashlib.sha256(_key(content).encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _slug(value: Value) -> str:
    """[8, 11] -> 8-11: what every file system takes."""
    return re.sub(r"[^a-z0-9.+]+", "-", str(value).lower()).strip("-")


def _check_different(entries: Sequence[RunEntry], runs: list[Run]) -> None:
    given = Counter(entry.name for entry in entries if entry.name)
    twice = [name for name, count in given.items() if count > 1]
    if twice:
        raise UserError(f"two runs are called {twice[0]}")
    seen: dict[str, str] = {}
    for run in runs:
        settings = _key(run.settings())
        if settings in seen:
            raise UserError(f"runs {seen[settings]} and {run.name} have one and the same configuration; leave one out")
        seen[settings] = run.name


def _rank_by(asked: str | None, figures: list[str]) -> str:
    if asked is None:
        return DEFAULT_FIGURE if DEFAULT_FIGURE in figures else figures[0]
    if asked not in figures:
        near = difflib.get_close_matches(asked, figures, n=1, cutoff=0)[0]
        raise UserError(f"rank_by: no figure {asked!r} among those of its probes; did you mean {near!r}?")
    return asked


def _explain(error: ErrorDetails) -> str:
    *where, key = error["loc"] or ("it",)
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg'].lower()}, got {error['input']!r}"
    fields = (RunEntry if where else SweepFile).model_fields
    near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0)[0]
    return f"unknown key {'.'.join(map(str, error['loc']))!r}; did you mean {near!r}?"
