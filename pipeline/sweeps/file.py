"""A sweep's file, read into runs with names and resolved configurations, and the refiners that the runs share.

The file's keys: base is a recipe's name, or a tree of configuration. grid is {key: values}; every combination of the
values is a run. runs is a list of {name, set: {key: value}}; if there is a grid, too, each entry is repeated at every
point of the grid. The keys in grid and set are those of the configuration, and `refiner`: fit, or none for raw targets.
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
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from pipeline.config import Config, Positive, Section, load_config, recipes, resource
from pipeline.config.load import read_yaml, yaml_problem
from pipeline.evaluation.figures import FIGURES, choose_figure, figures_of
from singer.errors import UserError, continued

# The sections that may vary in a sweep, because the cache stays the same.
SECTIONS = ("refine", "student", "distill", "evaluate")
REFINER = "refiner"
_LONGEST = 80

Value = Any
# The task `head` is missing, because students have no classification head.
PROBES = tuple(task for task in FIGURES if task != "head")


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise PydanticCustomError("name", "a name has letters, digits and . _ + - and begins with a letter or a digit")
    return name


def _known_probe(name: str) -> str:
    if name not in PROBES:
        raise PydanticCustomError("unknown", f"no such probe; known: {', '.join(PROBES)}")
    return name


Name = Annotated[str, Field(max_length=_LONGEST), AfterValidator(_plain_name)]
Probe = Annotated[str, AfterValidator(_known_probe)]


class RunEntry(Section):
    """An entry of the list of runs; without a name, it is named after the keys that it sets."""

    name: Name | None = None
    set: dict[str, Value] = Field(default_factory=dict)


class SweepFile(Section):
    """The content of a sweep's file, as the module describes it.

    probes: the tasks by which every student is evaluated; rank_by: the figure that ranks the students; together: the
    largest number of students that train on one pass over the data.
    """

    base: Any = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)
    runs: tuple[RunEntry, ...] = ()
    probes: Annotated[tuple[Probe, ...], Field(min_length=1)] = ("classification",)
    rank_by: str | None = None
    together: Positive = 1


@dataclass(frozen=True)
class Run:
    """A student to train.

    label: its name without seeds; changes: {key: resolved value} of the keys that the file sets; refiner: the name of
    its refiner, or None for raw targets and for adapters that are trained with the student.
    """

    name: str
    label: str
    changes: dict[str, Value]
    config: Config
    refiner: str | None

    def settings(self) -> dict[str, Value]:
        """Return {key: value} of everything that the run's figures depend on."""
        return _settings(self.config, self.refiner is not None)


@dataclass(frozen=True)
class Plan:
    """A sweep.

    refiners: {name: configuration}; rank_by: a task and the path in its result, joined by dots; together: the largest
    number of students on one pass.
    """

    base: Config
    runs: tuple[Run, ...]
    refiners: dict[str, Config]
    probes: tuple[str, ...]
    rank_by: str
    together: int = 1


def find_sweep(file: str | Path) -> Path:
    """Return the path of a file, or of a bundled sweep by its name; raise UserError if there is neither."""
    bundled = resource("configs") / "sweeps"
    for path in (Path(file), bundled / f"{file}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in bundled.glob("*.yaml")))
    raise UserError(f"{file}: no such file, nor a bundled sweep among {known}")


def read_plan(path: Path, on_error: str | None = None) -> Plan:
    """Read a sweep's file; raise UserError, in one line, for a mistake in it.

    on_error: data.on_error of all its configurations, in the place of the file's.
    """
    try:
        return make_plan(read_yaml(path.read_text()), () if on_error is None else (f"data.on_error={on_error}",))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({yaml_problem(error)})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def make_plan(tree: Any, sets: Sequence[str] = ()) -> Plan:
    """Return the plan of a file's content; raise UserError for a mistake in it. sets: KEY=VALUE, after its base."""
    try:
        file = SweepFile.model_validate(tree or {})
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from None
    if not file.grid and not file.runs:
        raise UserError("it has neither grid nor runs; give one of them, or both")
    base = _base(file.base)
    drafts = [_draft(entry, point, base, sets) for entry in file.runs or (RunEntry(),) for point in _points(file.grid)]
    runs, refiners = _named(drafts)
    _check_different(file.runs, runs)
    probes = tuple(dict.fromkeys(file.probes))
    return Plan(
        load_config(base, sets),
        tuple(runs),
        refiners,
        probes,
        choose_figure(file.rank_by, figures_of(probes)),
        file.together,
    )


@dataclass(frozen=True)
class _Draft:
    """A run before it has its final name.

    given: its name in the file, if any; own: the keys that its name contains, too.
    """

    given: str | None
    own: tuple[str, ...]
    changes: dict[str, Value]
    config: Config
    has_refiner: bool


def _base(base: Any) -> str | dict[str, Any]:
    """Return the name of a recipe, or a tree of configuration; raise UserError for anything else."""
    if isinstance(base, str):
        if base not in recipes() and not Path(base).is_file():
            raise UserError(f"base: no file {base}, nor a recipe among {', '.join(recipes())}")
        return base
    if not isinstance(base, dict) or not all(isinstance(keys, dict | None) for keys in base.values()):
        raise UserError("base takes a recipe's name, or sections with keys")
    return base


def _setting(key: str, value: Value) -> str:
    """Return "key=value" for load_config, with the value as JSON, which is YAML, too."""
    return f"{key}={json.dumps(value, default=str)}"


def _points(grid: Mapping[str, list[Value]]) -> Iterable[dict[str, Value]]:
    return (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _draft(entry: RunEntry, point: dict[str, Value], base: str | dict[str, Any], sets: Sequence[str]) -> _Draft:
    twice = sorted(set(entry.set) & set(point))
    if twice:
        raise UserError(f"{twice[0]} is set by grid and by {entry.name or 'a run'}; leave one out")
    changes = {**entry.set, **point}
    for key in changes:
        _check_key(key)
    refiner = changes.pop(REFINER, "fit")
    if refiner not in ("none", "fit", None):
        raise UserError(f"{REFINER} is none or fit, not {refiner!r}")
    config = load_config(base, [*sets, *(_setting(key, value) for key, value in changes.items())])
    resolved = {key: _at(config, key) for key in changes}
    if REFINER in entry.set or REFINER in point:
        resolved[REFINER] = refiner or "none"
    # Joint training trains its own adapters.
    has_refiner = refiner == "fit" and not config.distill.joint
    own = [*(() if entry.name else entry.set), *point]
    return _Draft(entry.name, tuple(own), resolved, config, has_refiner)


def _check_key(key: str) -> None:
    section, dot, _ = key.partition(".")
    if key == REFINER or (dot and (section in SECTIONS or section not in Config.model_fields)):
        return  # load_config reports a key that does not exist, with the nearest one that does
    if dot:
        raise UserError(f"{key} belongs to the cache, and a sweep has one cache; it varies {', '.join(SECTIONS)}")
    ends = {REFINER: REFINER, **{k: f"{s}.{k}" for s in SECTIONS for k in getattr(Config(), s).model_dump()}}
    (near,) = difflib.get_close_matches(key, ends, n=1, cutoff=0)
    raise UserError(f"unknown key {key!r}; did you mean {ends[near]!r}?")


def _at(config: Config, key: str) -> Value:
    section, _, name = key.partition(".")
    return config.model_dump(mode="json")[section][name]


def _settings(config: Config, has_refiner: bool) -> dict[str, Value]:
    tree = config.model_dump(mode="json")
    sections = [s for s in SECTIONS if s != "refine" or has_refiner or config.distill.joint]
    return {REFINER: "fit" if has_refiner else "none", **{f"{s}.{k}": v for s in sections for k, v in tree[s].items()}}


def _named(drafts: list[_Draft]) -> tuple[list[Run], dict[str, Config]]:
    """Return runs and refiners; their names depend only on their settings and on the keys that the file sets."""
    keys = {key for draft in drafts for key in draft.changes}
    ends = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in keys}

    def name(draft: _Draft, seeds: bool) -> str:
        own = [k for k in draft.own if seeds or not k.endswith(".seed")]
        parts = [f"{short[k]}-{_slug(draft.changes[k])}" for k in own]
        return "_".join([*filter(None, [draft.given]), *parts]) or "base"

    names = _unique([(name(d, True), d.changes) for d in drafts])
    # A refiner is named after the first run that needs it.
    firsts = {_section(d): d for d in reversed(drafts) if d.has_refiner}
    refiner_names = dict(zip(firsts, _unique([(_refiner_name(d), s) for s, d in firsts.items()]), strict=True))
    runs = [
        Run(n, name(d, False), d.changes, d.config, refiner_names[_section(d)] if d.has_refiner else None)
        for n, d in zip(names, drafts, strict=True)
    ]
    return runs, {refiner_names[section]: draft.config for section, draft in firsts.items()}


def _section(draft: _Draft) -> str:
    refine, teachers = draft.config.refine.model_dump(mode="json"), draft.config.distill.teachers
    # Each cache is refined for the teacher that the students learn from.
    return _key([refine, teachers] if teachers is not None else refine)


def _refiner_name(draft: _Draft) -> str:
    """Return a refiner's name: its cleaner and normaliser, and the other keys that are set."""
    refine = draft.config.refine
    more = {k.removeprefix("refine."): v for k, v in draft.changes.items() if k.startswith("refine.")}
    parts = [f"{k}-{_slug(v)}" for k, v in more.items() if k not in ("cleaner", "normaliser")]
    return "_".join([f"{refine.cleaner}-{refine.normaliser}", *parts])


def _unique(named: list[tuple[str, Any]]) -> list[str]:
    """Return unique names: a name that is too long or not unique ends with the beginning of its content's hash."""
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
    """Return a value as text that every file system accepts: 8-11 for [8, 11]."""
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
            raise UserError(f"runs {seen[settings]} and {run.name} have the same configuration; leave one out")
        seen[settings] = run.name


def _explain(error: ErrorDetails) -> str:
    *where, key = error["loc"] or ("it",)
    if error["type"] != "extra_forbidden":
        return f"{'.'.join(map(str, error['loc'])) or 'it'}: {continued(error['msg'])}, got {error['input']!r}"
    fields = (RunEntry if where else SweepFile).model_fields
    near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0)[0]
    return f"unknown key {'.'.join(map(str, error['loc']))!r}; did you mean {near!r}?"
