"""What a student minimises: (student tokens, targets) -> one loss a record and block.

Both come as {teacher block: (B, N, d)} on one token grid with the same prefix tokens, the student's already
projected to the teacher's width. A new objective is a function and a registry line.
"""

from collections.abc import Callable

from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]


def mse(student: Tensor, target: Tensor) -> Tensor:
    """L_KD of FitNet and SiNGER: mean squared error over tokens and channels. (B, N, d) -> (B,)."""
    return (student - target).square().mean(dim=(1, 2))


OBJECTIVES: dict[str, Objective] = {"mse": mse}
