"""The image size of a model of timm: which one it was built for, whether it runs at it, and how it gets another one."""

import inspect
from typing import Any

import torch

from pipeline.models.fetching import first_line
from singer.backbones import block_outputs, depth, gives_tokens, layout, patch_size, prefix_tokens
from singer.errors import UserError
from singer.sizes import ImageSize, Size, check_multiple


def takes_image_size(model: Any) -> bool:
    """Return whether a model is built for one image size; others work at any size and have no argument for it."""
    if gives_tokens(model):
        constructors = [vars(kind)["__init__"] for kind in type(model).__mro__ if "__init__" in vars(kind)]
        return any("img_size" in inspect.signature(init).parameters for init in constructors[:-1])  # object is last
    return bool(model.pretrained_cfg.get("fixed_input_size"))


def built_size(model: Any) -> Any:
    """Return the image size, (rows, columns) in pixels, that a model of tokens was built for; None if it has none."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size if gives_tokens(model) and takes_image_size(model) else None


def change_size(model: Any, size: ImageSize, subject: str) -> None:
    """Interpolate the positions of a model whose images are not square to another size.

    timm does so while it loads weights, but takes their grid for a square. Raises UserError if it cannot be done.
    """
    if not hasattr(model, "set_input_size"):
        raise UserError(f"{subject}: a {type(model).__name__} of images that are not square cannot get another size")
    patch = patch_size(model)
    if patch is not None:
        check_multiple(size, patch, f"{subject}: ")
    model.set_input_size(img_size=tuple(Size.of(size)))


@torch.inference_mode()
def check_rectangle(model: Any, size: Size, subject: str) -> None:
    """Raise UserError if a model does not run on images that are not square: some take the root for their grid."""
    last, training = depth(model) - 1, model.training
    try:
        tokens = block_outputs(model.eval(), torch.zeros(1, 3, *size), [last])[last]
        (_, (rows, columns)) = layout(model, size)[last]
        if tokens.shape[1] != prefix_tokens(model) + rows * columns:
            raise ValueError(f"it gives {tokens.shape[1]} tokens for a grid of {rows} x {columns}")
    except Exception as error:  # each architecture raises errors of its own types
        kind = type(model).__name__
        raise UserError(
            f"{subject}: a {kind} does not run on images of {size} pixels ({first_line(error)}){square_instead(size)}"
        ) from error
    model.train(training)


def square_instead(size: Any) -> str:
    """Return the remedy where a size may be at fault, "" if it is that of a square."""
    return "" if size is None or isinstance(size, int) else f"; take a square, such as image_size {min(size)}"
