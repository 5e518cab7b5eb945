"""A reference of all keys with type, default and meaning: as YAML that can be saved, and as a page."""

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipeline.config.fields import Section, keys, section_of
from pipeline.config.sections import Config

_AFFECTS = {
    "result": "what comes out",
    "details": "further figures, besides those that tables compare",
    "speed": "how long it takes, and what a crash costs",
    "place": "where something is read or written; its content is compared by hash",
    "failures": "what is done with broken input",
}
_NAMES = {str: "text", Path: "path", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def as_yaml(config: Config) -> str:
    """Return a configuration as YAML that load_config reads back, with the meaning of every key above it."""
    parts = []
    tree = config.model_dump(mode="json")
    for name in Config.model_fields:
        section = section_of(Config, name)
        lines = [f"# {line}" for line in _summary(section)] + [f"{name}:"]
        for key, about in keys(section):
            lines += [f"  # {_text(section, key)} ({kind_of(section, key)}; affects {about.affects})"]
            lines += [f"  {key}: {json.dumps(tree[name][key], ensure_ascii=False)}"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def as_markdown() -> str:
    """Return the page docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every key, generated from the code by `singer config --markdown`. A YAML file has sections with keys;",
        "`--set section.key=value` sets one; `singer config` prints all with their values, as YAML that can be saved.",
        "The column *affects* says what changes with a key:",
        "",
        *(f"- *{name}*: {what}" for name, what in _AFFECTS.items()),
        "",
        "A run that goes on with `--resume` must have the same values of keys that affect the result. Keys with a star",
        "must be the same for students that train on one pass over the data.",
    ]
    defaults = Config().model_dump(mode="json")
    for name in Config.model_fields:
        section = section_of(Config, name)
        lines += [
            "",
            f"## {name}",
            "",
            *_summary(section),
            "",
            "| key | type | default | meaning | affects |",
            "|---|---|---|---|---|",
        ]
        for key, about in keys(section):
            default = json.dumps(defaults[name][key], ensure_ascii=False)
            star = " *" if about.shared else ""
            kind, text = (part.replace("|", "\\|") for part in (kind_of(section, key), _text(section, key)))
            lines.append(f"| `{key}`{star} | {kind} | `{default}` | {text} | {about.affects} |")
    return "\n".join(lines) + "\n"


def _summary(section: type[Section]) -> list[str]:
    """Return the paragraphs of a section's docstring, each on one line."""
    return [" ".join(part.split()) for part in (section.__doc__ or "").split("\n\n")]


def _text(section: type[Section], key: str) -> str:
    """Return the description of a key."""
    return section.model_fields[key].description or ""


def kind_of(section: type[Section], key: str) -> str:
    """Describe the type of a key in words, such as number > 0 or auto."""
    field = section.model_fields[key]
    return _type(field.annotation, list(field.metadata))


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Describe a type in words, with its bounds. metadata: what pydantic keeps beside the type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], [*metadata, *inner[1:]])
    if origin is Literal:
        return " or ".join(f"{value}" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one, metadata if one is not type(None) else []) for one in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            element = _type(inner[0], [])
            return f"list of {f'({element})' if ' or ' in element else element}"
        return f"[{', '.join(_type(one, []) for one in inner)}]"
    if origin is dict:
        return f"names with {_type(inner[1], [])}"
    bounds = [*_bounds(metadata)] if annotation in (int, float) else []
    return " ".join([_NAMES[annotation], *bounds])


def _bounds(metadata: list[Any]) -> list[str]:
    """List the bounds of a number, such as "≥ 1"."""
    found = []
    for one in metadata:
        # In an Annotated with pydantic's Field, a FieldInfo holds the bounds.
        for held in getattr(one, "metadata", [one]):
            for name, word in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
                if (bound := getattr(held, name, None)) is not None:
                    found.append(f"{word} {bound:g}" if bound < 1e6 else f"{word} 2^32")
    return found
