"""Wider exits of Vision Transformers: the last block gives more channels than the blocks before it.

"From Per-Image Low-Rank to Encoding Mismatch" (arXiv 2511.15572): a narrow student lacks channels for its teacher's
tokens. `lift` keeps a linear map to the teacher's width after the last block; `wide` widens the last block itself. Both
are parts of the student and stay in it. timm builds such a model by the name `vit_exit` once this module is imported.
"""

from collections.abc import Mapping
from typing import Any, Literal

import timm
from timm.models import register_model
from timm.models._builder import load_pretrained, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from singer.errors import UserError

Exit = Literal["lift", "wide"]
NAME = "vit_exit"
_STD = 0.02


def vit_exit(
    pretrained: bool = False,
    *,
    base: str,
    exit: Exit,
    exit_width: int,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **args: Any,
) -> nn.Module:
    """Build the model `base` of timm with a wider exit; the other arguments are those of timm.create_model.

    exit_width: channels of the last block. Weights that were saved are loaded after the exit is there; those that timm
    has for the base are loaded before. Raises UserError if the base is no plain Vision Transformer.
    """
    saved = pretrained and bool(pretrained_cfg or pretrained_cfg_overlay)
    model = timm.create_model(base, pretrained=pretrained and not saved, **args)
    if not isinstance(model, VisionTransformer) or isinstance(model.norm, nn.Identity) or model.attn_pool is not None:
        raise UserError(f"student.exit {exit}: {base} is no Vision Transformer of timm with a norm at the end")
    _widen(model, base, exit, exit_width, args)
    if pretrained_cfg:
        cfg = resolve_pretrained_cfg(NAME, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    else:  # a file says nothing about its images, which are those of the base
        cfg = {**model.pretrained_cfg, **(pretrained_cfg_overlay or {})}
    model.pretrained_cfg = {**cfg, "architecture": NAME}
    if saved:
        load_pretrained(model, model.pretrained_cfg, model.num_classes, filter_fn=checkpoint_filter_fn)
    built: nn.Module = model
    return built


register_model(vit_exit)


def _widen(model: VisionTransformer, base: str, exit: Exit, width: int, args: dict[str, Any]) -> None:
    """Widen the exit of a model; its norm and head become as wide."""
    narrow, heads = int(model.embed_dim), int(model.blocks[-1].attn.num_heads)
    if width < narrow:
        raise UserError(f"student.exit {exit}: {width} channels are fewer than the student's {narrow}")
    more = width * heads // narrow if width * heads % narrow == 0 else heads
    if width % more:
        raise UserError(f"student.exit {exit}: {width} channels are not a multiple of the student's {heads} heads")
    # Two blocks of the base, but wider: their last has the base's settings, such as its rate of drop path.
    wide: Any = timm.create_model(base, **{**args, "embed_dim": width, "num_heads": more, "depth": 2})
    if exit == "wide":
        block = wide.blocks[-1]
        block.widen = nn.Linear(narrow, width, bias=False)
        block.widen_norm = type(model.norm)(width)
        nn.init.trunc_normal_(block.widen.weight, std=_STD)
        block.register_forward_pre_hook(_widened)
        model.blocks[-1] = block
    else:
        model.blocks[-1].lift = nn.Linear(narrow, width)
        nn.init.trunc_normal_(model.blocks[-1].lift.weight, std=_STD)
        nn.init.zeros_(model.blocks[-1].lift.bias)
        model.blocks[-1].register_forward_hook(_lifted)
    model.norm, model.head = wide.norm, wide.head
    model.feature_info[-1]["num_chs"] = width
    model.body_dim = narrow
    model.embed_dim = model.num_features = model.head_hidden_size = width


def _widened(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Widen the tokens (B, N, d) that a block is called with."""
    return (block.widen_norm(block.widen(args[0])), *args[1:])


def _lifted(block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Lift the tokens (B, N, d) that a block returned."""
    lifted: Tensor = block.lift(output)
    return lifted


def exit_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what builds the wider exit whose weights are in a state dict, {exit, exit_width}; {} if there is none."""
    kinds: dict[str, Exit] = {".lift.weight": "lift", ".widen.weight": "wide"}
    for name, tensor in state.items():
        for end, kind in kinds.items():
            if name.startswith("blocks.") and name.endswith(end):
                return {"exit": kind, "exit_width": int(tensor.shape[0])}
    return {}


def has_exit(model: nn.Module) -> bool:
    """Return whether a model has a wider exit."""
    return hasattr(model, "body_dim")
