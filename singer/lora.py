"""LoRA: matrices of a model stay as they are, and changes of low rank are trained (arXiv:2106.09685).

WeCoLoRA (arXiv:2404.09326) trains blocks that a student has copied from its teacher in this way.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from singer.errors import UserError

# Names in the state of a model: those of a frozen weight and its change begin in this way, after that of their layer.
_MARK = ".parametrizations.weight."


class LowRank(nn.Module):
    """The change of a matrix W (m, n) to W + up · down, with up (m, rank) and down (rank, n).

    At first it changes nothing: up is zero, and down starts as the weight of a linear layer does.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        # Drawn on the CPU, so that all devices start alike.
        down = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))
        self.up, self.down = nn.Parameter(weight.new_zeros(rows, rank)), nn.Parameter(down.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed matrix (m, n)."""
        # In half precision, small changes would be lost.
        with torch.autocast(weight.device.type, enabled=False):
            return _changed(weight, self.up, self.down)


def train_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze the matrices of a model's blocks that would be trained, and train a change of each instead.

    These are the weights of linear layers; the model computes at first what it did. Raises UserError if there are none,
    or if the rank is larger than a side of one.
    """
    blocks: Any = getattr(model, "blocks", None)
    parts = blocks.modules() if isinstance(blocks, nn.Module) else ()
    layers = [part for part in parts if isinstance(part, nn.Linear) and part.weight.requires_grad]
    if not layers:
        raise UserError(
            f"student.lora: no matrix in blocks of this {type(model).__name__} would be trained; do without it: "
            "--set student.lora=null"
        )
    most = min(min(layer.weight.shape) for layer in layers)
    if rank > most:
        raise UserError(
            f"student.lora {rank} is larger than {most}, a side of one of the student's matrices; "
            f"the most is --set student.lora={most}"
        )
    for layer in layers:
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def with_changes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a model with its changes of low rank added to the matrices, as if it never had any."""
    found = {}
    for name, tensor in state.items():
        layer, _, part = name.partition(_MARK)
        change = f"{layer}{_MARK}0."
        if f"{change}up" not in state:
            found[name] = tensor
        elif part == "original":
            found[f"{layer}.weight"] = _changed(tensor, state[f"{change}up"], state[f"{change}down"])
    return found


def _changed(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.addmm(weight, up, down)
