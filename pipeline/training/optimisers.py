"""The optimiser of a student: Muon for its matrices, or AdamW for all weights; which decay, or have lower rates."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from pipeline.config import TrainingConfig
from pipeline.training.muon import Muon
from singer.errors import UserError

# Besides vectors and biases, these never decay: CLS, register and mask tokens, position embeddings, and scales with
# more than one axis.
_NO_DECAY = ("*_token", "*_tokens", "*pos_embed", "*.position_embedding*", "*.gamma")


def new_optimiser(model: nn.Module, settings: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return an optimiser of a student (model.student) and what is trained with it, which are on `device`.

    Muon (Jordan et al., 2024, as timm has it) makes the update of a matrix orthogonal, so that all its directions are
    learnt alike, and as large as AdamW's (arXiv:2502.16982), so that both take the same rates. Weights that do not
    decay, such as norms, tokens and positions, have the update of NAdamW, and so have small or very long matrices. A
    layer_decay "auto" is 1 here: only who knows the start of the student can apply its rule (schedule.layer_decay).
    """
    # Of 1, so that a group that does not decay is known by its 0, whatever distill.weight_decay is.
    groups = decay_groups(model, 1.0, 1.0 if settings.layer_decay == "auto" else settings.layer_decay)
    for group in groups:
        if settings.optimizer == "muon":
            group["use_fallback"] = group["weight_decay"] == 0
        group["weight_decay"] *= settings.weight_decay
    if settings.optimizer == "muon":
        return Muon(groups)
    # One kernel for all weights, where there is one; on CPUs the default stays.
    return torch.optim.AdamW(groups, fused=device.type == "cuda" or None)


def decay_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group the parameters of a student (model.student) and what is trained with it.

    Biases, norms, scales, tokens and position embeddings do not decay, nor do the weights that the student's
    architecture names. With a layer_decay below 1, groups of the student have `lr_scale`: the factor of their learning
    rate, layer_decay for each layer after them, the head counted as one (BEiT, arXiv:2106.08254). Raises UserError if
    the student has no order of layers.
    """
    student: Any = model.student
    named: Any = getattr(student, "no_weight_decay", set)
    if layer_decay == 1:
        exempt = {f"student.{name}" for name in named()} | set(_NO_DECAY)
        groups: list[dict[str, Any]] = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
        return groups
    if not hasattr(student, "group_matcher"):
        raise UserError(f"layer_decay: a {type(student).__name__} has no order of layers; set it to 1")
    rest = nn.ModuleDict({name: module for name, module in model.named_children() if name != "student"})
    own = param_groups_layer_decay(student, weight_decay, {*named(), *_NO_DECAY}, layer_decay=layer_decay)
    return [*own, *param_groups_weight_decay(rest, weight_decay, no_weight_decay_list=_NO_DECAY)]
