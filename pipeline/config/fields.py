"""How a key of the configuration is declared: its default, what it is, and what it affects."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from singer.errors import UserError

Affects = Literal["result", "details", "speed", "place", "failures"]
"""What changes with a key.

result: what comes out; a run that goes on must have the same value, and tables of runs show it. details: further
figures, besides those that tables compare. speed: how long it takes, and what a crash costs. place: where something is
read or written; its content is compared by hash. failures: what is done with broken input.
"""


class Section(BaseModel):
    """A section of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Meta:
    """What a key declares besides its type, default and description.

    affects: see Affects. shared: students that train on one pass must have the same value. only: the tasks, or the
    cleaners ("trained"), to which the key applies; empty: it applies to all. shape: it belongs to the student's name.
    by_machine: outputs hold what "auto" was on the machine that began them. part_of: a key of the section, by_machine,
    whose "auto" decides this one, too, where it has its default.
    """

    affects: Affects
    shared: bool = False
    only: tuple[str, ...] = ()
    shape: bool = False
    by_machine: bool = False
    part_of: str = ""


def key(
    default: Any,
    description: str,
    affects: Affects = "result",
    *,
    shared: bool = False,
    only: tuple[str, ...] = (),
    shape: bool = False,
    by_machine: bool = False,
    part_of: str = "",
    **constraints: Any,
) -> Any:
    """Declare a key of a section. constraints: those of pydantic's Field; the other arguments: see Meta."""
    field = Field(default, description=description, **constraints)
    assert isinstance(field, FieldInfo)
    field.metadata.append(Meta(affects, shared, only, shape, by_machine, part_of))
    return field


def meta(section: type[Section], name: str) -> Meta:
    """Return what a key declares. Raises TypeError if it was not declared by `key`."""
    found = [m for m in section.model_fields[name].metadata if isinstance(m, Meta)]
    if len(found) != 1:
        raise TypeError(f"{section.__name__}.{name} does not say what it affects; declare it by key(...)")
    return found[0]


def keys(section: type[Section]) -> Iterator[tuple[str, Meta]]:
    """Iterate over the keys of a section in their order."""
    return ((name, meta(section, name)) for name in section.model_fields)


def left_open(section: Section, name: str) -> bool:
    """Return whether a key is left to the machine, so that an output that exists decides it."""
    about = meta(type(section), name)
    if about.part_of:
        is_default = getattr(section, name) == type(section).model_fields[name].default
        return is_default and left_open(section, about.part_of)
    return about.by_machine and getattr(section, name) == "auto"


def section_of(config: BaseModel | type[BaseModel], name: str) -> type[Section]:
    """Return the class of a section of the configuration by its name."""
    annotation = (config if isinstance(config, type) else type(config)).model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation


def takes_text(annotation: Any) -> bool:
    """Return whether a key takes a name or a path, and no number or truth value."""
    kinds = {annotation} | {inner for one in get_args(annotation) for inner in (one, *get_args(one))}
    return bool(kinds & {str, Path}) and not kinds & {int, float, bool}


def check_ranges(section: Section, *names: str) -> None:
    """Raise UserError if a range (low, high) of a section ends below its start."""
    for name in names:
        low, high = getattr(section, name)
        if low > high:
            raise UserError(f"{name}: {low} is larger than {high}")
