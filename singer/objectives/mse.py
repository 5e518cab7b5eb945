"""FitNet's and SiNGER's L_KD (arXiv 1412.6550, 2509.20986)."""

from torch import Tensor

from singer.objectives.base import Objective


class Mse(Objective):
    """Mean squared error over tokens and channels."""

    tokenwise = True

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute the mean squared error (B,) of one block's tokens (B, N, d)."""
        return (student - target).square().mean(dim=(1, 2))
