"""Models of the user's own: `package.module:function`, whose result is a module and its Description.

The function is called without arguments. Code runs only because a command or a program names it, never because a cache
or a run does.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from pipeline.models.backbone import Backbone
from pipeline.models.fetching import first_line
from pipeline.models.huggingface import WEIGHTS, backbone_of, load_weights
from pipeline.models.names import OWN, is_function
from singer.described import Description, as_backbone
from singer.errors import UserError
from singer.sizes import ImageSize, Size

Own: TypeAlias = tuple[nn.Module, Description]
"""A module, and the description of it."""


def create_own(
    name: str, image_size: ImageSize | None, weights: Path | None, what: str, averaged: bool = True
) -> Backbone:
    """Call the function package.module:function; the arguments are those of loading.create_model.

    Raises UserError if there is no such function, or its result is not as it describes.
    """
    made = _call(name, f"{what} {name}")
    backbone = describe_own(made, image_size, f"{what} {name}")
    if weights is not None:
        load_weights(backbone.model.backbone, weights, name, averaged)
    return backbone


def describe_own(made: Own, image_size: ImageSize | None, subject: str) -> Backbone:
    """Return a backbone for a module of the user's own. image_size: in pixels, default: as described."""
    module, description = made
    if image_size is not None:
        description = replace(description, image_size=image_size)
    try:
        described = as_backbone(module, description)
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None
    except Exception as error:  # the user's code raises errors of any type
        size = Size.of(description.image_size)
        raise UserError(f"{subject} does not run at {size} pixels: {_said(error)}") from error
    about = asdict(description)
    arguments = {k: about[k] for k in ("blocks", "patch_size", "prefix", "class_token", "norm")}
    return backbone_of(described, f"{OWN}{type(module).__name__}", arguments)


def object_name(made: Own) -> str:
    """Return the name under which a module that is given as an object is recorded."""
    return f"{OWN}{type(made[0]).__name__}"


def saved_own(folder: Path, architecture: str, image_size: ImageSize | None, function: str | None) -> Backbone:
    """Load a model of the user's own that `save_backbone` saved. function: its name, given by the user.

    Raises UserError if no function is given: the folder does not choose which code is run.
    """
    if function is None or not is_function(function):
        raise UserError(
            f"{folder} is a {architecture.removeprefix(OWN)}, a module of your own; name the function that makes it: "
            "--set student.name=package.module:function"
        )
    backbone = create_own(function, image_size, None, "student.name")
    load_weights(backbone.model, folder / WEIGHTS, function, True)
    return backbone


def _call(name: str, subject: str) -> Own:
    place, _, function = name.partition(":")
    try:
        with _here():
            source = importlib.import_module(place)
            make: Any = getattr(source, function, None)
            if make is None:
                raise UserError(f"{subject}: {source.__file__} has no {function}")
            made = make()
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise UserError(f"{subject} failed: {_said(error)}") from error
        raise UserError(f"{subject}: there is no module {error.name} in this folder or among the packages") from None
    except UserError:
        raise
    except Exception as error:  # the user's code raises errors of any type
        raise UserError(f"{subject} failed: {_said(error)}") from error
    match made:
        case (nn.Module() as module, Description() as description):
            return module, description
    raise UserError(f"{subject} returns a {type(made).__name__}; return (module, singer.Description(...))")


@contextmanager
def _here() -> Iterator[None]:
    """Find modules of the current folder, too, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
