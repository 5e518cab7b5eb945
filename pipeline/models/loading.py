"""Load models: any by its name, and those that singer saved.

Most are timm's. Names that begin with hf: are models of transformers, package.module:function is a model of one's own.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor

from pipeline.models import student_exits  # timm then knows students with a wider exit
from pipeline.models.backbone import Backbone
from pipeline.models.fetching import first_line, why_not_fetched
from pipeline.models.hints import nearest_model
from pipeline.models.huggingface import WEIGHTS, create_transformers, saved_transformers
from pipeline.models.input_sizes import built_size, change_size, check_rectangle, square_instead, takes_image_size
from pipeline.models.names import CONFIG, HF, LOCAL, OWN, is_function, is_transformers, local_folder
from pipeline.models.outlines import fitting_models, outline_of
from pipeline.models.own import create_own, saved_own
from pipeline.models.weights import read_weights
from pipeline.runtime.logs import adopt_libraries
from pipeline.storage.json_files import read_json
from singer.backbones import gives_tokens, patch_size
from singer.errors import UserError
from singer.sizes import ImageSize, Size, check_multiple

# The names under which ViTs and other architectures keep the weight of their head.
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
_BY_FOLDER = f"a student that has an exit is named by its folder, with its {CONFIG}: {LOCAL}RUN/student"
# What to do without a network; the keys say where the name of the model was given.
_REMEDIES = {
    "teacher.name": "give a local file with --weights FILE (teacher.weights)",
    "student.name": "check the network or its cache",
    "model": "give a local file with --weights FILE",
}


def load_saved(folder: Path, image_size: ImageSize | None = None, function: str | None = None) -> Backbone:
    """Load a model that was saved by `save_backbone`, timm or transformers.

    function: for a model of the user's own, the function that makes it. Raises UserError if it is needed and not given.
    """
    architecture = str(read_json(folder, CONFIG, "model folder").get("architecture"))
    if architecture.startswith(OWN):
        return frozen(saved_own(folder, architecture, image_size, function))
    return load_model(f"{LOCAL}{folder}", image_size=image_size)


def load_model(name: str, weights: Path | None = None, image_size: ImageSize | None = None) -> Backbone:
    """Load any pretrained model, frozen, by a name as teacher.name has it.

    weights: a local file; default: those in the folder, or those that timm fetches. image_size: in pixels; default: the
    model's own.
    """
    return frozen(create_model(name, image_size, {}, weights, pretrained=True, what="model"))


def check_known(name: str, message: str) -> None:
    """Raise UserError(message), with the nearest name, if timm has no such model.

    Names with a prefix such as hf-hub: are not checked here.
    """
    if ":" in name or timm.is_model(name):
        return
    near = nearest_model(name)
    raise UserError(message + (f"; did you mean {near!r}?" if near else ""))


def frozen(backbone: Backbone) -> Backbone:
    """Return a backbone in eval mode, whose weights need no gradient."""
    backbone.model.requires_grad_(False).eval()
    return backbone


def create_model(
    name: str,
    image_size: ImageSize | None,
    args: Mapping[str, Any],
    weights: Path | None,
    pretrained: bool,
    what: str,
    averaged: bool = True,
) -> Backbone:
    """Build a model.

    image_size: in pixels, None for the model's own; args: more arguments of timm.create_model; weights: a local file;
    averaged: see read_weights; pretrained: whether to load weights; what: the setting that names the model, for
    messages. Raises UserError if the model, its weights or its image size cannot be used.
    """
    other = _other_source(name, image_size, args, weights, pretrained, what, averaged)
    if other is not None:
        return other
    kwargs = {k: v for k, v in args.items() if v is not None}
    if image_size is not None:
        kwargs["img_size"] = image_size = Size.of(image_size).written
    folder = local_folder(name)
    if folder is not None:
        saved = _saved_args(folder)
        kwargs = saved | kwargs
        if weights is None and isinstance(size := Size.of(saved.get("img_size", 1)).written, tuple):
            kwargs["img_size"] = size  # timm would take the grid of its positions for a square; see change_size
        weights = weights or folder / "model.safetensors"
    check_known(name, f"{what}: timm has no model {name!r}")
    if name == student_exits.NAME and "exit" not in kwargs:
        raise UserError(f"{what} {name}: {_BY_FOLDER}; a new one has the name of another model, and student.exit")
    if weights is not None:
        state = read_weights(weights, _tensor_names(name, args), averaged)
        if "exit" not in kwargs and (exit := student_exits.exit_of(state)):
            raise UserError(f"weights {weights} are those of student.exit {exit['exit']}; {_BY_FOLDER}")
        kwargs |= _weights_args(state, kwargs.get("num_classes"))
    model = _build(name, pretrained, kwargs, weights, what)
    kwargs.pop("pretrained_cfg_overlay", None)
    pretrained_cfg = model.pretrained_cfg
    # The tag of a model on the hub changes its head, so the architecture alone does not give the same head.
    args = {**getattr(model, "_model_args", {}), **kwargs, "num_classes": model.num_classes}
    if image_size is not None and kwargs.get("img_size", image_size) != image_size:
        change_size(model, image_size, f"{what} {name}")
    size = _input_size(model, image_size, f"{what} {name}")
    if takes_image_size(model):
        args["img_size"] = size.written
    else:
        args.pop("img_size", None)
    if gives_tokens(model) and hasattr(model, "global_pool"):
        args["global_pool"] = model.global_pool
    return Backbone(
        model=model,
        architecture=pretrained_cfg["architecture"],
        model_args=args,
        image_size=size.written,
        mean=tuple(pretrained_cfg["mean"]),
        std=tuple(pretrained_cfg["std"]),
    )


def _saved_args(folder: Path) -> dict[str, Any]:
    """Return the arguments with which the model of a folder was built. Raises UserError if they are damaged."""
    args = read_json(folder, CONFIG, "model folder").get("model_args", {})
    if not isinstance(args, dict):
        raise UserError(f"{folder / CONFIG} is damaged: model_args is not an object")
    return args


def _weights_args(state: Mapping[str, Tensor], classes: int | None) -> dict[str, Any]:
    """Return the arguments of timm.create_model that load a state dict. classes: None for those of its head, if any.

    timm's own loader converts other layouts and interpolates the position embedding. With an empty source, it takes
    this state dict, and not the weights of the place that the name stands for.
    """
    if classes is None:
        head = next((state[key] for key in _HEADS if key in state), None)
        classes = 0 if head is None else head.shape[0]
    overlay = {"state_dict": state, "source": "", "num_classes": classes, "custom_load": False}
    return {"num_classes": classes, "pretrained_cfg_overlay": overlay}


def _input_size(model: Any, image_size: ImageSize | None, subject: str) -> Size:
    """Return the size of a model's input. Raises UserError if it is not `image_size`, or cannot be a rectangle."""
    size = Size.of(built_size(model) or image_size or model.pretrained_cfg["input_size"][1:])
    if image_size is not None and size.written != image_size:
        asked = Size.of(image_size)
        raise UserError(f"{subject}: it was built for {size} pixels, and image_size {asked} was asked for")
    if size.height != size.width:
        check_rectangle(model, size, subject)
    return size


def _other_source(
    name: str,
    image_size: ImageSize | None,
    args: Mapping[str, Any],
    weights: Path | None,
    pretrained: bool,
    what: str,
    averaged: bool,
) -> Backbone | None:
    """Build a model that is not timm's; None if the name is one of timm. The arguments are those of create_model."""
    folder = local_folder(name)
    config = {} if folder is None else read_json(folder, CONFIG, "model folder")
    architecture = str(config.get("architecture", name))
    if architecture.startswith(OWN):
        raise UserError(
            f"{what} {name} is a module of a program; name a function that makes it, package.module:function"
            + (f", and --weights {folder / WEIGHTS}" if folder is not None else "")
        )
    if not (architecture.startswith(HF) or is_function(name) or is_transformers(config)):
        return None
    given = [key for key, value in args.items() if value is not None and key != "num_classes"]
    if given:
        raise UserError(f"{what} {name}: {', '.join(given)} can be chosen only for a model of timm")
    if is_function(name):
        return create_own(name, image_size, weights, what, averaged)
    if folder is not None and not is_transformers(config):
        return saved_transformers(folder, config, image_size, weights)
    source = name if folder is None else f"{HF}{folder}"
    return create_transformers(source, image_size, weights, pretrained, what, averaged)


def _tensor_names(name: str, args: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensors of a model of timm; none if it cannot be built (_build says why)."""
    try:
        return set(outline_of(name, {k: v for k, v in args.items() if v is not None}).state_dict())
    except Exception:  # timm raises errors of many types
        return set()


def _build(name: str, pretrained: bool, kwargs: Mapping[str, Any], weights: Path | None, what: str) -> Any:
    # The hub's client warns about every retry. The error that is raised below reports the result once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    subject = f"{what} {name}"
    try:
        plain = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg_overlay", "img_size")}
        outline = outline_of(name, plain)
        if not hasattr(outline, "forward_intermediates"):
            raise UserError(f"{subject}: timm gives no features of the blocks of a {type(outline).__name__}")
        patch, size = patch_size(outline), kwargs.get("img_size")
        if patch and size is not None:
            check_multiple(size, patch, f"{subject}: ")
        if not takes_image_size(outline):
            kwargs = {k: v for k, v in kwargs.items() if k != "img_size"}
        if pretrained and weights is None:
            subject = f"weights of {subject} were not loaded"
        elif weights is not None:
            subject = f"weights {weights} do not fit {name}"
        adopt_libraries()
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except Exception as error:  # timm, the hub's client and torch raise errors of their own types
        reason = why_not_fetched(error)
        if reason is not None:
            raise UserError(f"weights of {what} {name} were not fetched: {reason}; {_REMEDIES[what]}") from error
        if not isinstance(error, _INPUT_ERRORS) and "unexpected keyword argument" not in str(error):
            raise  # this is a defect, or the disk fails
        remedy = f"; {_REMEDIES[what]}" if subject.startswith("weights of") else square_instead(kwargs.get("img_size"))
        if subject.startswith(f"weights {weights} "):
            remedy = fitting_models(name, kwargs["pretrained_cfg_overlay"]["state_dict"])
        raise UserError(f"{subject}: {_first_mismatch(error)}{remedy}") from error


# timm and torch raise these errors for wrong arguments, names and weights. Other errors are defects.
_INPUT_ERRORS = (
    AssertionError, FileNotFoundError, KeyError, RuntimeError, SafetensorError, UnpicklingError, ValueError,
)  # fmt: skip


def _first_mismatch(error: Exception) -> str:
    """Return torch's message about the first tensor that does not fit, or the first line of another error."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].startswith("Error(s) in loading"):
        return " ".join(lines[1:2])[:300]
    return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else first_line(error)
