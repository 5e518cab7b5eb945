"""Load timm models: teachers with their weights, new students, and students that a run saved."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.runtime.logs import adopt_libraries
from pipeline.storage.outputs import read_json
from pipeline.storage.tensors import read_tensors
from pipeline.teachers.backbone import Backbone
from pipeline.teachers.fetching import first_line, why_not_fetched
from pipeline.teachers.names import LOCAL, local_folder
from singer.backbones import is_vit
from singer.errors import UserError

# The names under which ViTs and other architectures keep the weight of their head.
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
# What to do without a network; the keys say where the name of the model was given.
_REMEDIES = {
    "teacher.name": "give a local file with --weights FILE (teacher.weights)",
    "student.name": "check the network or its cache",
    "model": "give a local file with --weights FILE",
}


def load_teacher(config: TeacherConfig) -> Backbone:
    """Load the teacher with its weights, in eval mode, at config.image_size (position embedding interpolated)."""
    return _frozen(
        create_model(config.name, config.image_size, {}, config.weights, pretrained=True, what="teacher.name")
    )


def load_saved(folder: Path, image_size: int | None = None) -> Backbone:
    """Load a model that was saved in timm's local-dir layout, by `save_backbone` or by timm itself."""
    return load_model(f"{LOCAL}{folder}", image_size=image_size)


def load_model(name: str, weights: Path | None = None, image_size: int | None = None) -> Backbone:
    """Load any pretrained model of timm, frozen, by a name that timm knows, hf-hub:USER/NAME or local-dir:FOLDER.

    weights: a local file; default: those in the folder, or those that timm fetches. image_size: in pixels; default: the
    model's own.
    """
    return _frozen(create_model(name, image_size, {}, weights, pretrained=True, what="model"))


def check_known(name: str, message: str) -> None:
    """Raise UserError(message), with the nearest name, if timm has no such model.

    Names with a prefix such as hf-hub: are not checked here.
    """
    if ":" in name or timm.is_model(name):
        return
    family = timm.list_models(f"{name[:3]}*") or timm.list_models(module="vision_transformer")
    near = difflib.get_close_matches(name, family, n=1, cutoff=0.4)
    raise UserError(message + (f"; did you mean {near[0]!r}?" if near else ""))


def _frozen(vit: Backbone) -> Backbone:
    vit.model.requires_grad_(False).eval()
    return vit


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file; nothing but tensors is ever unpickled.

    Raises UserError if the file is missing or damaged, or if it holds no state dict.
    """
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors differ in type
        raise UserError(f"weights {path} cannot be read: {first_line(error)}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"weights {path}: expected a state dict of tensors")
    return loaded


def create_model(
    name: str,
    image_size: int | None,
    args: Mapping[str, Any],
    weights: Path | None,
    pretrained: bool,
    what: str,
) -> Backbone:
    """Build a model of timm.

    image_size: in pixels, None for the model's own; args: more arguments of timm.create_model; weights: a local file;
    pretrained: whether to load weights; what: the setting that names the model, for messages. Raises UserError if the
    model, its weights or its image size cannot be used.
    """
    kwargs = {k: v for k, v in args.items() if v is not None}
    if image_size is not None:
        kwargs["img_size"] = image_size
    folder = local_folder(name)
    if folder is not None:
        config = read_json(folder, "config.json", "timm model folder")
        model_args = config.get("model_args", {})
        if not isinstance(model_args, dict):
            raise UserError(f"{folder / 'config.json'} is damaged: model_args is not an object")
        kwargs = {**model_args, **kwargs}
        weights = weights or folder / "model.safetensors"
    check_known(name, f"{what}: timm has no model {name!r}")
    if weights is not None:
        state = read_weights(weights)
        head = next((state[key] for key in _HEADS if key in state), None)
        kwargs.setdefault("num_classes", 0 if head is None else head.shape[0])
        # timm's own loader converts other layouts and interpolates the position embedding. With an empty source, it
        # takes this state dict, and not the weights of the place that the name stands for.
        overlay = {"state_dict": state, "source": "", "num_classes": kwargs["num_classes"], "custom_load": False}
        kwargs["pretrained_cfg_overlay"] = overlay
    model = _build(name, pretrained, kwargs, weights, what)
    kwargs.pop("pretrained_cfg_overlay", None)
    pretrained_cfg = model.pretrained_cfg
    # The tag of a model on the hub changes its head, so the architecture alone does not give the same head.
    args = {**getattr(model, "_model_args", {}), **kwargs, "num_classes": model.num_classes}
    if is_vit(model):
        size = model.patch_embed.img_size
        args |= {"img_size": size[0], "global_pool": model.global_pool}
    else:
        size = (image_size, image_size) if image_size else tuple(pretrained_cfg["input_size"][1:])
        if not pretrained_cfg.get("fixed_input_size"):
            args.pop("img_size", None)
    if size[0] != size[1]:
        raise UserError(f"{what} {name}: only square inputs are supported, not {size}")
    return Backbone(
        model=model,
        architecture=pretrained_cfg["architecture"],
        model_args=args,
        image_size=size[0],
        mean=tuple(pretrained_cfg["mean"]),
        std=tuple(pretrained_cfg["std"]),
    )


def _build(name: str, pretrained: bool, kwargs: Mapping[str, Any], weights: Path | None, what: str) -> Any:
    # The hub's client warns about every retry. The error that is raised below reports the result once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    subject = f"{what} {name}"
    try:
        plain = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg_overlay", "img_size")}
        with torch.device("meta"):
            outline = timm.create_model(name, **plain)
        if isinstance(outline, VisionTransformer):
            patch, size = outline.patch_embed.patch_size[0], kwargs.get("img_size")
            if size is not None and size % patch:
                near = f"the nearest is {max(1, round(size / patch)) * patch}"
                raise UserError(f"{subject}: image_size {size} is not a multiple of the patch size {patch}; {near}")
        elif what == "teacher.name":
            raise UserError(f"{subject}: it is a {type(outline).__name__}, not a VisionTransformer of timm")
        elif not outline.pretrained_cfg.get("fixed_input_size"):
            # The model works at any image size and has no argument for it.
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
        remedy = f"; {_REMEDIES[what]}" if subject.startswith("weights of") else ""
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
