"""Hold a model with what is needed to build it again, and save it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.storage.json_files import write_json
from pipeline.storage.tensors import write_tensors
from singer.backbones import gives_tokens, has_cls, layout, prefix_tokens
from singer.sizes import ImageSize, Size

# Every image is resized to a model's image size in this way (data.views.apply_view).
INTERPOLATION = "bicubic"


@dataclass(frozen=True)
class Backbone:
    """A model and what is needed to build it again.

    architecture: a name of timm, hf: and a model type of transformers, or own: and a class; model_args: what builds it;
    image_size: in pixels, the side of a square or (height, width); mean, std: of RGB in [0, 1].
    """

    model: Any
    architecture: str
    model_args: dict[str, Any]
    image_size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def gives_tokens(self) -> bool:
        """Return whether the model has tokens, and not feature maps."""
        return gives_tokens(self.model)

    @property
    def prefix(self) -> int:
        """Return the number of CLS and register tokens."""
        return prefix_tokens(self.model)

    @property
    def has_cls(self) -> bool:
        """Return whether the model has a class token."""
        return has_cls(self.model)

    @cached_property
    def layout(self) -> list[tuple[int, tuple[int, int]]]:
        """Return (width, grid of the patch tokens) of every block or stage."""
        return layout(self.model, self.image_size)

    @property
    def body_width(self) -> int:
        """Return the width, in channels, of the blocks but the last, which may be wider (exits); of maps, the last."""
        return self.layout[0][0] if self.gives_tokens else self.width

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights, in which the model takes its images."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def width(self) -> int:
        """Return the width of the last block, in channels."""
        return self.layout[-1][0]

    @property
    def grid(self) -> tuple[int, int]:
        """Return the grid of the last block's patch tokens."""
        return self.layout[-1][1]


def save_backbone(backbone: Backbone, state: Mapping[str, Tensor], folder: Path) -> None:
    """Save weights and configuration.

    timm.create_model("local-dir:FOLDER", pretrained=True) then gives a model of timm; load_saved gives any model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", state)
    write_json(folder / "config.json", timm_config(backbone))


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """Return the configuration that timm stores as config.json beside the weights."""
    known = backbone.model.pretrained_cfg
    own = {key: known.get(key) for key in ("fixed_input_size", "first_conv", "classifier")}
    if known.get("label_names"):
        own["label_names"] = list(known["label_names"])
    return {
        "architecture": backbone.architecture,
        "num_classes": backbone.model.num_classes,
        "num_features": backbone.model.num_features,
        "model_args": backbone.model_args,
        "pretrained_cfg": {
            "num_classes": backbone.model.num_classes,
            "input_size": (3, *Size.of(backbone.image_size)),
            "interpolation": INTERPOLATION,
            "crop_pct": 1.0,
            "mean": backbone.mean,
            "std": backbone.std,
            **own,
        },
    }


def weight_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a state dict.

    The position embedding is left out: it is interpolated to the image size, which is recorded separately.
    """
    digest = hashlib.sha256()
    for name in sorted(set(state) - {"pos_embed"}):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else repr(tensor.item()).encode())
    return digest.hexdigest()
