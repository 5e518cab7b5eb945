"""Loading timm Vision Transformers: teachers with their weights, new students, students that a run saved."""

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
from pipeline.storage.outputs import read_json, read_tensors
from pipeline.teachers.backbone import Backbone
from pipeline.teachers.fetching import first_line, why_not_fetched
from singer.backbones import is_vit
from singer.errors import UserError

LOCAL = "local-dir:"
# Where ViTs and other architectures keep the weight of their head.
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
# What to do without a network, by the place that names the model.
_REMEDIES = {
    "teacher.name": "give a local file with --weights FILE (teacher.weights)",
    "student.name": "check the network or its cache",
    "model": "give a local file with --weights FILE",
}


def local_folder(name: str) -> Path | None:
    """The folder that a `local-dir:` name stands for; None for other names."""
    return Path(name.removeprefix(LOCAL)).expanduser() if name.startswith(LOCAL) else None


def load_teacher(config: TeacherConfig) -> Backbone:
    """The teacher with its weights, in eval mode, at config.image_size (position embedding interpolated)."""
    return _frozen(
        create_model(config.name, config.image_size, {}, config.weights, pretrained=True, what="teacher.name")
    )


def load_saved(folder: Path, image_size: int | None = None) -> Backbone:
    """A model saved in timm's local-dir layout, by `save_backbone` or by timm itself."""
    return load_model(f"{LOCAL}{folder}", image_size=image_size)


def load_model(name: str, weights: Path | None = None, image_size: int | None = None) -> Backbone:
    """Any pretrained model of timm, frozen, by a name of timm's, hf-hub:USER/NAME or local-dir:FOLDER.

    weights: a local file; default: the folder's, or those that timm fetches. image_size: pixels; default: the model's.
    """
    return _frozen(create_model(name, image_size, {}, weights, pretrained=True, what="model"))


def check_known(name: str, message: str) -> None:
    """Raise UserError(message), with the nearest name, if timm has no such model; other places are asked later."""
    if ":" in name or timm.is_model(name):
        return
    family = timm.list_models(f"{name[:3]}*") or timm.list_models(module="vision_transformer")
    near = difflib.get_close_matches(name, family, n=1, cutoff=0.4)
    raise UserError(message + (f"; did you mean {near[0]!r}?" if near else ""))


def _frozen(vit: Backbone) -> Backbone:
    vit.model.requires_grad_(False).eval()
    return vit


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file, never unpickling anything but tensors."""
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
    kwargs = {k: v for k, v in args.items() if v is not None}
    if image_size is not None:
        kwargs["img_size"] = image_size
    folder = local_folder(name)
    if folder is not None:
        config = read_json(folder, "config.json", "timm model folder")
        model_args = config.get("model_args", {})
        if not isinstance(model_args, dict):
            raise UserError(f"{folder / 'config.json'} is damaged: model_args is no object")
        kwargs = {**model_args, **kwargs}
        weights = weights or folder / "model.safetensors"
    check_known(name, f"{what}: timm has no model {name!r}")
    if weights is not None:
        state = read_weights(weights)
        head = next((state[key] for key in _HEADS if key in state), None)
        kwargs.setdefault("num_classes", 0 if head is None else head.shape[0])
        # Through timm's own loader: it converts foreign layouts and interpolates the position embedding.
        # An empty source makes it take this state dict, whatever place the name stands for.
        overlay = {"state_dict": state, "source": "", "num_classes": kwargs["num_classes"], "custom_load": False}
        kwargs["pretrained_cfg_overlay"] = overlay
    model = _build(name, pretrained, kwargs, weights, what)
    kwargs.pop("pretrained_cfg_overlay", None)
    pretrained_cfg = model.pretrained_cfg
    # Hub tags change the head; the architecture alone would rebuild another one.
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
    # The hub's client warns of every retry; what comes of them is said here, once.
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
            # It takes any size, and no argument for it.
            kwargs = {k: v for k, v in kwargs.items() if k != "img_size"}
        if pretrained and weights is None:
            subject = f"weights of {subject} were not loaded"
        elif weights is not None:
            subject = f"weights {weights} do not fit {name}"
        adopt_libraries()
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except UserError:
        raise
    except Exception as error:  # timm, the hub client and torch each raise their own
        reason = why_not_fetched(error)
        if reason is not None:
            raise UserError(f"weights of {what} {name} were not fetched: {reason}; {_REMEDIES[what]}") from error
        if not isinstance(error, _OF_WHAT_WAS_GIVEN) and "unexpected keyword argument" not in str(error):
            raise  # a defect, or the disk
        remedy = f"; {_REMEDIES[what]}" if subject.startswith("weights of") else ""
        raise UserError(f"{subject}: {_first_mismatch(error)}{remedy}") from error


# What timm and torch raise for arguments, names and weights that are wrong, each in its own way; others are defects.
_OF_WHAT_WAS_GIVEN = (
    AssertionError, FileNotFoundError, KeyError, RuntimeError, SafetensorError, UnpicklingError, ValueError,
)  # fmt: skip


def _first_mismatch(error: Exception) -> str:
    """The first tensor that a state dict does not fit, or an error's first line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].startswith("Error(s) in loading"):
        return " ".join(lines[1:2])[:300]
    return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else first_line(error)
