"""Group what is trained for an optimiser: which weights decay, and which have a lower learning rate."""

from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from singer.errors import UserError

# Besides vectors and biases, these never decay: CLS, register and mask tokens, position embeddings, and scales with
# more than one axis.
_NO_DECAY = ("*_token", "*_tokens", "*pos_embed", "*.position_embedding*", "*.gamma")


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
