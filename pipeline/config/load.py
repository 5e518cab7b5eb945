"""How the configuration is read: defaults, then a YAML file, then direct options and `--set section.key=value`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import Composer

from pipeline.config.fields import keys, section_of, takes_text
from pipeline.config.reference import kind_of
from pipeline.config.refine import VARIANTS, VARIED, RefineConfig
from pipeline.config.sections import Config
from pipeline.config.student import StudentConfig
from singer.errors import UserError, continued

# libyaml, where PyYAML was built with it, writes ten times as fast, and reads seven times as fast.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load_config(
    file: str | Path | Mapping[str, Any] | None = None,
    sets: Iterable[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Resolve the configuration.

    file: a YAML file, the name of a bundled recipe, or what such a file holds. sets: `section.key=value` with a YAML
    value. options: {"section.key": value} of direct options; None values are left out.
    Raises UserError that names the key, what is wrong and the nearest valid key.
    """
    base = _sections(file) if isinstance(file, Mapping) else _read(file) if file is not None else {}
    given = {name: value for name, value in (options or {}).items() if value is not None}
    for item in sets or ():
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes section.key=value, not {item!r}")
        try:
            given[name] = _value(name, text)
        except yaml.YAMLError:
            raise UserError(f"--set {name}: {text!r} is not a YAML value") from None
    tree = _without_variant(_without_shape(base, given.get("student.name")), given.get("refine.variant"))
    for name, value in given.items():
        _put(tree, name, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"configuration: {_explain(first)}") from None


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that load_config reads back to the same tree."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_DUMPER, sort_keys=False))


def _fast_loader() -> type[yaml.CSafeLoader | yaml.SafeLoader]:
    if not yaml.__with_libyaml__:
        return yaml.SafeLoader

    class Loader(Composer, yaml.CSafeLoader):
        """libyaml's parser under PyYAML's composer.

        libyaml's own composer recurses in C: a file that nests deeply, which a stranger may have made, would end the
        process.
        """

        def __init__(self, stream: bytes) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            Composer.__init__(self)

    return Loader


_LOADER = _fast_loader()


def read_dumped(text: bytes) -> Any:
    """Return what dump_config wrote, as plain values. Raises yaml.YAMLError or RecursionError if it did not."""
    return yaml.load(text, Loader=_LOADER)


def resource(name: str) -> Path:
    """Find configs/ or data/...: in a wheel it is inside the package, in a checkout beside it."""
    here = Path(__file__).resolve().parent.parent
    inside = here / name
    return inside if inside.exists() else here.parent / name


def recipes() -> list[str]:
    """List the names of the bundled recipes."""
    return sorted(p.stem for p in resource("configs").glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """A loader of YAML that leaves text to the keys, and refuses a key that is there twice.

    PyYAML reads 010 as 8, 1:30 as 90, no as false and 2024-01-05 as a date. Here they are text, which a key that takes
    numbers or truth values then reads as a person does (10, an error, false), and a name stays as it is written. Of a
    key that is there twice, PyYAML takes the last in silence.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping as it is written, before merges. Raises YAMLError for a key that is there twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.YAMLError(f"{key.value!r} is there twice, again in line {key.start_mark.line + 1}")
            seen.add(name)
        return node


# {kind of value: (what it looks like without quotes, its first characters)}. All else is text. PyYAML, which writes the
# configuration, puts quotes around text that looks like this.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+0123456789."],
    ),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}  # none of PyYAML's
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
    """Return the content of a YAML file. Raises yaml.YAMLError if it has none, or a key twice."""
    return yaml.load(text, Loader=_Loader)


def yaml_problem(error: Exception) -> str:
    """Return what is wrong with YAML, and in which line, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, in line {error.problem_mark.line + 1}"
    return str(error).splitlines()[0]


def _read(file: str | Path) -> dict[str, Any]:
    """Read the sections of a YAML file or a bundled recipe. Raises UserError if that is not possible."""
    path = Path(file)
    if not path.is_file():
        bundled = resource("configs") / f"{file}.yaml"
        if not bundled.is_file():
            raise UserError(f"--config {file}: no such file, nor a recipe among {', '.join(recipes())}")
        path = bundled
    try:
        tree = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {file}: not YAML ({yaml_problem(error)})") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"--config {file}: expected sections with keys, found {type(tree).__name__}")
    return _sections(tree or {})


def _sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the sections, so that more keys can be added; YAML reads an empty section as None."""
    return {section: {} if keys is None else copy(keys) for section, keys in tree.items()}


def _without_shape(tree: dict[str, Any], student: str | None) -> dict[str, Any]:
    """Leave out the file's shape of the student if `student` is another one than the file's."""
    given = tree.get("student", {})
    if student is None or not isinstance(given, dict) or given.get("name", StudentConfig().name) == student:
        return tree
    shape = [key for key, about in keys(StudentConfig) if about.shape]
    return {**tree, "student": {key: value for key, value in given.items() if key not in shape}}


def _without_variant(tree: dict[str, Any], variant: str | None) -> dict[str, Any]:
    """Leave out the values of the variant that a file names, which it may repeat, if `variant` is another one."""
    given = tree.get("refine", {})
    own = given.get("variant") if isinstance(given, dict) else None
    if variant in (None, own) or own not in VARIANTS:
        return tree
    before = RefineConfig(variant=own).model_dump(mode="json")
    kept = {key: value for key, value in given.items() if key not in VARIED or value != before[key]}
    return {**tree, "refine": kept}


def _value(name: str, text: str) -> Any:
    """Read the YAML value of a key, or its text where that is a name: a folder may be called 2024."""
    value = read_yaml(text)
    section, _, key = name.partition(".")
    if value is None or isinstance(value, str | list | dict) or section not in Config.model_fields:
        return value
    field = section_of(Config, section).model_fields.get(key)
    return text.strip() if field is not None and takes_text(field.annotation) else value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set section.key in a tree. Raises UserError if the name has no section, or the section no keys."""
    section, dot, key = name.partition(".")
    if not dot:
        raise UserError(f"--set {name}: give section.key, with a section among {', '.join(Config.model_fields)}")
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"configuration: section {section} holds no keys")
    branch[key] = value


def _explain(error: ErrorDetails) -> str:
    """Describe pydantic's error: the key, what is wrong, and the nearest key if there is no such key.

    That is the key of this name in another section, if just one has it.
    """
    # After section and key come places in lists, and names of other types that the value might have.
    where = ".".join(str(part) for n, part in enumerate(error["loc"]) if n < 2 or isinstance(part, int))
    if error["type"] == "value_error":  # a section's own check, which names the key
        return f"{where}.{error['ctx']['error']}"
    if error["type"] != "extra_forbidden":
        hint, given = "", error["input"]
        if error["type"] == "model_type":
            return f"{where}: a section has keys below it, as in --set {where}.KEY=VALUE; got {given!r}"
        if error["type"] in ("string_type", "path_type") and not isinstance(given, list | dict):
            hint = "; a name is put in quotes"
        elif len(error["loc"]) > 1 and error["type"].endswith(("_parsing", "_type")):
            # Of several types, the message names one alone.
            section, key = map(str, error["loc"][:2])
            hint = f"; {section}.{key} takes {kind_of(section_of(Config, section), key)}"
            if error["type"] in ("list_type", "tuple_type") and isinstance(given, str):
                hint += f", in brackets: [{given}]"
        return f"{where}: {continued(error['msg']).replace('tuple', 'list')}, got {given!r}{hint}"
    section, _, key = where.rpartition(".")
    elsewhere = [name for name in Config.model_fields if section and key in section_of(Config, name).model_fields]
    if len(elsewhere) == 1:
        section, near = elsewhere[0], [key]
    else:
        fields = section_of(Config, section).model_fields if section in Config.model_fields else Config.model_fields
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
    return f"unknown key {where!r}; did you mean {'.'.join([*filter(None, [section]), *near])!r}?"
