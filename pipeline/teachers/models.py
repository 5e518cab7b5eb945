"""Loading timm Vision Transformers: teachers with their weights, new students, students that a run saved."""

import difflib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pipeline.config import TeacherConfig
from pipeline.runtime.logs import adopt_libraries
from pipeline.storage.outputs import read_json, read_tensors, write_json, write_tensors
from singer.backbones import is_vit, layout
from singer.errors import UserError

LOCAL = "local-dir:"
# How every image is brought to the models' size (views.apply_view).
INTERPOLATION = "bicubic"
# Where ViTs and other architectures keep the weight of their head.
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
# What to do without a network, by the place that names the model.
_REMEDIES = {
    "teacher.name": "give a local file with --weights FILE (teacher.weights)",
    "student.name": "check the network or its cache",
    "model": "give a local file with --weights FILE",
}


@dataclass(frozen=True)
class Backbone:
    """A timm model and what is needed to build it again. Teachers are VisionTransformers; students need not be."""

    model: Any
    architecture: str
    model_args: dict[str, Any]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def is_vit(self) -> bool:
        return is_vit(self.model)

    @property
    def prefix(self) -> int:
        """CLS and register tokens."""
        return int(self.model.num_prefix_tokens) if self.is_vit else 0

    @property
    def has_cls(self) -> bool:
        return self.is_vit and bool(self.model.has_class_token)

    @cached_property
    def layout(self) -> list[tuple[int, tuple[int, int]]]:
        """(width, grid of the patch tokens) of every block, or stage."""
        return layout(self.model, self.image_size)

    @property
    def width(self) -> int:
        """Of the last block."""
        return self.layout[-1][0]

    @property
    def grid(self) -> tuple[int, int]:
        """Of the last block's patch tokens."""
        return self.layout[-1][1]


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


def save_backbone(vit: Backbone, state: Mapping[str, Tensor], folder: Path) -> None:
    """Weights and configuration such that timm.create_model("local-dir:FOLDER", pretrained=True) gives the model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", state)
    write_json(folder / "config.json", timm_config(vit))


def timm_config(vit: Backbone) -> dict[str, Any]:
    """What timm stores as config.json beside the weights."""
    own = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    if not vit.is_vit:
        own = {key: vit.model.pretrained_cfg.get(key) for key in own}
    return {
        "architecture": vit.architecture,
        "num_classes": vit.model.num_classes,
        "num_features": vit.model.num_features,
        "model_args": vit.model_args,
        "pretrained_cfg": {
            "num_classes": vit.model.num_classes,
            "input_size": (3, vit.image_size, vit.image_size),
            "interpolation": INTERPOLATION,
            "crop_pct": 1.0,
            "mean": vit.mean,
            "std": vit.std,
            **own,
        },
    }


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes of a state dict.

    The position embedding is left out: it is interpolated to the image size, which is recorded by itself.
    """
    digest = hashlib.sha256()
    for name in sorted(set(state) - {"pos_embed"}):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor.item()).encode())
    return digest.hexdigest()


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
        reason = _not_fetched(error)
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
_HINTS = {401: "no such model, or one that needs a login", 403: "access is not granted", 404: "no such model or file"}
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _not_fetched(error: BaseException) -> str | None:
    """Why something did not come from the network; None if that is not what an error is about.

    The hub's client says of most that the file is not on this disk; the cause is behind that.
    """
    chain = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "code", None)
        if isinstance(status, int):
            hints = {
                401: "no such model, or one that needs a login",
                403: "access is not granted",
                404: "no such model or file",
            }
            hint = f" ({hints[status]})" if status in hints else ""
            return f"the server answered {status}{hint}: {first_line(link)}"
    for link in reversed(chain):
        if isinstance(link, ConnectionError | TimeoutError | URLError | LocalEntryNotFoundError) or (
            type(link).__module__.split(".")[0] in _CLIENTS
        ):
            return f"no network ({type(link).__name__}: {first_line(link)})"
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _first_mismatch(error: Exception) -> str:
    """The first tensor that a state dict does not fit, or an error's first line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and lines[0].startswith("Error(s) in loading"):
        return " ".join(lines[1:2])[:300]
    return f"{type(error).__name__} {error}" if isinstance(error, KeyError) else first_line(error)
