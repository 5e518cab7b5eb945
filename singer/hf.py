"""Vision models of Hugging Face transformers as backbones: their families, and how each is called.

A family is one line of FAMILIES. Only transformers' own classes are built: no code that comes with a model is run.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singer.described import DescribedMaps, Description, as_backbone
from singer.errors import UserError
from singer.names import HF
from singer.sizes import ImageSize, Size


@dataclass(frozen=True)
class Family:
    """A model type: its class; the prefix tokens, without registers; whether the first is a class token.

    maps: whether it gives feature maps of stages, which have no patch size and no final norm of tokens.
    """

    model: str
    prefix: int = 1
    class_token: bool = True
    maps: bool = False


FAMILIES = {
    "dinov2": Family("Dinov2Model"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel"),
    "dinov3_vit": Family("DINOv3ViTModel"),
    "dinov3_convnext": Family("DINOv3ConvNextModel", 0, False, maps=True),
    "vit": Family("ViTModel"),
    "deit": Family("DeiTModel", 2),
    "clip_vision_model": Family("CLIPVisionModel"),
    "siglip_vision_model": Family("SiglipVisionModel", 0, False),
    "siglip2_vision_model": Family("Siglip2VisionModel", 0, False),
    "vit_mae": Family("ViTMAEModel"),
    "data2vec-vision": Family("Data2VecVisionModel"),
    "ijepa": Family("IJepaModel", 0, False),
}
# Two towers in one file: the type of the one that sees.
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
# Where versions of transformers keep the blocks (or stages) and the final norm.
_BLOCKS = (
    "layers", "layer", "encoder.layer", "encoder.layers", "model.layer", "model.stages", "stages",
    "vision_model.encoder.layers",
)  # fmt: skip
_NORMS = ("layernorm", "norm", "post_layernorm", "vision_model.post_layernorm")
# What a configuration says beside the architecture.
_ASIDE = {
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "id2label", "label2id", "num_labels", "problem_type",
}  # fmt: skip


def vision_part(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (architecture, arguments) of the vision model that a config.json of transformers describes.

    Raises UserError if its family is not known.
    """
    kind = config.get("model_type")
    if kind in _TOWERS:
        config, kind = config.get("vision_config", {}), _TOWERS[kind]
    if kind not in FAMILIES:
        own = "; code that comes with a model is never run" if "auto_map" in config else ""
        raise UserError(f"model type {kind!r} is not among those that are read: {', '.join(FAMILIES)}{own}")
    return f"{HF}{kind}", {key: value for key, value in config.items() if key not in _ASIDE}


def model_class(architecture: str) -> Any:
    """Return the class of transformers. Raises UserError if the package is missing or too old."""
    name = FAMILIES[architecture.removeprefix(HF)].model
    try:
        return getattr(importlib.import_module("transformers"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError("models of hf: need the package transformers: pip install 'singer-vit[hf]'") from None
    except AttributeError:
        raise UserError(f"this transformers has no {name}: pip install -U transformers") from None


def configured(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a model; images are never masked."""
    config: Any = model_class(architecture).config_class(**arguments)
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0
    return config


def build(architecture: str, arguments: Mapping[str, Any]) -> DescribedMaps:
    """Build a backbone on the current device, with random weights."""
    config, kind = configured(architecture, arguments), model_class(architecture)
    # The pooler reads the final norm's output. Nothing here does, and most checkpoints lack it.
    without = {"add_pooling_layer": False} if takes_pooler(kind) else {}
    return wrap(architecture, kind(config, **without), native_size(config))


def takes_pooler(kind: Any) -> bool:
    """Return whether a class of transformers can be built without its pooler."""
    return "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def native_size(config: Any) -> ImageSize:
    """Return the size, in pixels, of the images that a model was made for."""
    size = getattr(config, "image_size", None)
    if size is None:  # a model for any size says how many patches it learned positions for
        return int(config.num_patches**0.5) * int(config.patch_size)
    return Size.of(size).written


def wrap(
    architecture: str,
    model: nn.Module,
    image_size: ImageSize,
    mean: tuple[float, ...] = Description.mean,
    std: tuple[float, ...] = Description.std,
) -> DescribedMaps:
    """Make a model of transformers a backbone. image_size: in pixels; mean, std: of RGB in [0, 1]."""
    family, config = FAMILIES[architecture.removeprefix(HF)], model.config
    names = {name for name, _ in model.named_modules()}
    patch: Any = None if family.maps else config.patch_size  # type: ignore[union-attr]
    description = Description(
        blocks=next(name for name in _BLOCKS if name in names),
        image_size=image_size,
        patch_size=None if patch is None else Size.of(patch).written,
        prefix=family.prefix + int(getattr(config, "num_register_tokens", 0) or 0),
        class_token=family.class_token,
        norm=None if family.maps else next((name for name in _NORMS if name in names), None),
        mean=mean,
        std=std,
    )
    return as_backbone(model, description, _run)


def _run(model: nn.Module, images: Tensor) -> object:
    """Call a model of transformers with images (B, 3, H, W): none is masked, and positions fit any size."""
    takes, config, size = inspect.signature(model.forward).parameters, model.config, Size(*images.shape[-2:])
    options: dict[str, Any] = {}
    patch = Size.of(getattr(config, "patch_size", None) or 1)
    grid = size.grid(patch)
    if "interpolate_pos_encoding" in takes and size != Size.of(native_size(config)):
        options["interpolate_pos_encoding"] = True
    if "noise" in takes:  # patches are put in the order of this noise even where none is masked
        order = torch.arange(grid.height * grid.width, device=images.device)
        options["noise"] = order.expand(len(images), -1)
    if "spatial_shapes" in takes:
        cut = images.unflatten(3, (grid.width, patch.width)).unflatten(2, (grid.height, patch.height))
        images = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # cut: (B, 3, rows, height, columns, width)
        options |= {
            "pixel_attention_mask": None,
            "spatial_shapes": torch.tensor([grid] * len(images), device=images.device),
        }
    return model(images, **options)
