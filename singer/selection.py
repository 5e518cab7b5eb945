"""Weight selection: cut the weights of a smaller model out of those of a larger one of the same family.

"Initializing Models with Larger Ones" (Xu et al., 2023, arXiv:2311.18823): a smaller model starts from some blocks of
the larger one and, in each, from evenly spaced channels. Channels of the attention are chosen head by head, so that
queries still meet their keys; hidden units of an MLP and channels of the residual stream are chosen alike everywhere.
"""

from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from singer.backbones import body_width, depth, gives_tokens

Order = Literal["first", "even"]
"""Which blocks: the first ones, or evenly spaced ones up to the last."""


def even(larger: int, smaller: int) -> Tensor:
    """Return `smaller` evenly spaced numbers below `larger`, beginning with 0; numbers repeat if there are too few."""
    return torch.arange(smaller) * larger // smaller


def chosen_blocks(larger: int, smaller: int, order: Order) -> list[int]:
    """Return which of `larger` blocks each of `smaller` blocks starts from."""
    if order == "first":
        return list(range(smaller))
    return [round((block + 1) * larger / smaller) - 1 for block in range(smaller)]


def misfit(source: nn.Module, student: nn.Module) -> str | None:
    """Say why a student's weights cannot be cut out of those of `source`; return None if they can.

    Only names and shapes are read, so that both may be on the device meta.
    """
    for model, whose in ((source, "it"), (student, "the student")):
        if not len(getattr(model, "blocks", ())):
            return f"{whose} has no list of transformer blocks"
    if type(source) is not type(student):
        return f"it is a {type(source).__name__} and the student a {type(student).__name__}"
    if not gives_tokens(source) or len(source.blocks) != depth(source):  # type: ignore[arg-type]
        return f"no weights are cut out of a {type(source).__name__}"
    for what, here, there in (
        ("blocks", depth(source), depth(student)),
        ("channels", body_width(source), body_width(student)),
    ):
        if there > here:
            return f"it has {here} {what} and the student {there}"
    have, want = source.state_dict(), student.state_dict()
    for name, tensor in want.items():
        if name.startswith("blocks.0.") and tensor.dim() > 1 and (name not in have or have[name].dim() != tensor.dim()):
            return f"its blocks have no {name.removeprefix('blocks.0.')}"
    ours, theirs = _Shape(source), _Shape(student)
    if ours.gated != theirs.gated or ours.hidden < theirs.hidden:
        return f"its MLPs have {ours.hidden} hidden units and the student's {theirs.hidden}, or only one has gates"
    if getattr(student, "rope", None) is not None and ours.head_width != theirs.head_width:
        return f"its heads have {ours.head_width} channels and the student's {theirs.head_width}, which turn in pairs"
    return None


@torch.no_grad()
def select_weights(source: nn.Module, student: nn.Module, order: Order = "first") -> dict[str, Tensor]:
    """Return the state of a student that starts from `source`, on the CPU; see `misfit` for what fits.

    A tensor that only the student has, such as register tokens or a head, keeps its value. Where only the source scales
    its branches (LayerScale), the scales become part of the weights before them.
    """
    have = {name: tensor.detach().cpu() for name, tensor in source.state_dict().items()}
    state = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    ours, theirs = _Shape(source), _Shape(student)
    blocks = chosen_blocks(depth(source), depth(student), order)
    for name, old in state.items():
        origin = name
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            origin = f"blocks.{blocks[int(number)]}.{rest}"
        found = have.get(origin)
        if found is None or found.dim() != old.dim():
            continue
        if name in ("pos_embed", "patch_embed.proj.weight"):
            continue
        if any(wanted > there for wanted, there in zip(old.shape, found.shape, strict=True)):
            continue  # a wider exit than the source is
        found = _scaled(found, origin, have, name, state)
        for axis in range(old.dim()):
            found = found.index_select(axis, _kept(name, axis, found.shape[axis], old.shape[axis], ours, theirs))
        if found.shape == old.shape:
            state[name] = found.to(old.dtype).contiguous()
    _select_patches(have, state)
    _select_positions(have, state, source, student)
    return state


class _Shape:
    """What the axes of weights consist of: heads of `head_width` channels, and hidden units (gated or not)."""

    def __init__(self, model: nn.Module) -> None:
        block: Any = model.blocks[0]  # type: ignore[index]
        self.heads = int(block.attn.num_heads)
        out: Tensor = block.attn.proj.weight
        self.head_width = int(out.shape[1]) // self.heads
        down: Any = getattr(block.mlp, "fc2", None)
        up: Any = getattr(block.mlp, "fc1", None)
        self.hidden = int(down.weight.shape[1]) if down is not None else 0
        self.gated = up is not None and int(up.weight.shape[0]) == 2 * self.hidden

    def kept(self, other: "_Shape") -> Tensor:
        """Return which channels of the heads a smaller model has."""
        heads, channels = even(self.heads, other.heads), even(self.head_width, other.head_width)
        return (heads[:, None] * self.head_width + channels).flatten()


def _kept(name: str, axis: int, larger: int, smaller: int, ours: _Shape, theirs: _Shape) -> Tensor:
    """Return which places on an axis of a weight a smaller model has."""
    if larger == smaller:
        return torch.arange(larger)
    part = name.split(".", 2)[-1] if name.startswith("blocks.") else ""
    of_heads = part.startswith(("attn.qkv", "attn.q_", "attn.k_", "attn.v_", "attn.norm")) and axis == 0
    if (of_heads and "_norm" not in part) or (part == "attn.proj.weight" and axis == 1):
        inner = ours.kept(theirs)
        groups = larger // (ours.heads * ours.head_width)  # queries, keys and values in one weight
        return (torch.arange(groups)[:, None] * (larger // groups) + inner).flatten()
    if part.startswith("mlp.fc1") and axis == 0 and ours.gated:
        return torch.cat([even(ours.hidden, theirs.hidden), ours.hidden + even(ours.hidden, theirs.hidden)])
    return even(larger, smaller)


def _scaled(found: Tensor, origin: str, have: dict[str, Tensor], name: str, state: dict[str, Tensor]) -> Tensor:
    """Multiply the last weight of a branch by its LayerScale if the student has none."""
    for layer, scale in ((".attn.proj.", ".ls1.gamma"), (".mlp.fc2.", ".ls2.gamma")):
        if layer in origin:
            gamma = origin.split(layer)[0] + scale
            if gamma in have and name.split(layer)[0] + scale not in state:
                return have[gamma].view(-1, *[1] * (found.dim() - 1)) * found
    return found


def _select_patches(have: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Select the filters of the patch embedding, and resample them to the student's patch size."""
    name = "patch_embed.proj.weight"
    found, old = have.get(name), state.get(name)
    if found is not None and old is not None and found.dim() == 4 and found.shape[1] == old.shape[1]:
        filters = resample_patch_embed(found.float(), list(old.shape[2:]))
        state[name] = filters[even(found.shape[0], old.shape[0])].to(old.dtype).contiguous()


def _select_positions(have: dict[str, Tensor], state: dict[str, Tensor], source: nn.Module, student: nn.Module) -> None:
    """Select the channels of the position embedding, and interpolate it to the student's grid.

    If only the source has positions for its prefix tokens, that of CLS is added to the class token.
    """
    found, old = have.get("pos_embed"), state.get("pos_embed")
    if found is None or old is None or found.dim() != 3:
        return
    found = found[..., even(found.shape[-1], old.shape[-1])].float()
    grid, target = ([int(n) for n in m.patch_embed.grid_size] for m in (source, student))  # type: ignore[union-attr]
    prefixes, wanted = found.shape[1] - grid[0] * grid[1], old.shape[1] - target[0] * target[1]
    patches = resample_abs_pos_embed(found[:, prefixes:], target, grid, num_prefix_tokens=0)
    prefix = old[:, :wanted].float() if prefixes != wanted else found[:, :wanted]
    if prefixes and prefixes != wanted and "cls_token" in state:
        prefix = torch.zeros_like(prefix)
        state["cls_token"] = state["cls_token"] + found[:, :1].to(state["cls_token"].dtype)
    state["pos_embed"] = torch.cat([prefix, patches], dim=1).to(old.dtype).contiguous()
