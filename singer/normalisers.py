"""Normalisers of clean targets: tokens (B, N, d) of a block -> tokens on a scale that suits a student.

A new normaliser is a class that takes a BlockSpec, and a line in the registry. `fit` gets the channel moments of clean
tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singer.cleaners import BlockSpec
from singer.errors import UserError


class Moments:
    """Running mean and variance, in float64, of clean patch tokens and of each prefix position.

    whole: also collect the covariance of patch tokens, which costs far more.
    """

    def __init__(self, spec: BlockSpec, whole: bool = False) -> None:
        d, self.whole = spec.width, whole
        self.patch_sum = torch.zeros(d, dtype=torch.float64)
        self.patch_products = torch.zeros((d, d) if whole else d, dtype=torch.float64)
        self.prefix_sums = torch.zeros(2, spec.prefix, d, dtype=torch.float64)
        self.patches = self.images = 0

    def add(self, prefix: Tensor, patches: Tensor) -> None:
        """Add prefix tokens (B, P, d) and clean patches (n, d)."""
        x, p = patches.double(), prefix.double()
        self.patch_sum += x.sum(0).cpu()
        self.patch_products += (x.T @ x if self.whole else x.square().sum(0)).cpu()
        self.prefix_sums += torch.stack([p.sum(0), p.square().sum(0)]).cpu()
        self.patches += len(x)
        self.images += len(p)

    @property
    def mean(self) -> Tensor:
        """Return the mean (d,) of patch tokens."""
        return self.patch_sum / max(1, self.patches)

    @property
    def covariance(self) -> Tensor:
        """Return the covariance (d, d) of patch tokens; only if `whole`."""
        assert self.whole
        return self.patch_products / max(1, self.patches) - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> Tensor:
        """Return the variance (d,) of patch tokens in each channel."""
        squares = self.patch_products.diagonal() if self.whole else self.patch_products
        return (squares / max(1, self.patches) - self.mean.square()).clamp_min(0)

    @property
    def prefix_mean(self) -> Tensor:
        """Return the mean (P, d) of each prefix position."""
        return self.prefix_sums[0] / max(1, self.images)

    @property
    def prefix_variance(self) -> Tensor:
        """Return the variance (P, d) of each prefix position in each channel."""
        return (self.prefix_sums[1] / max(1, self.images) - self.prefix_mean.square()).clamp_min(0)


class Normaliser(nn.Module):
    """`none`: targets stay as they are."""

    # True if `fit` needs the whole covariance.
    needs_covariance = False

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()

    def prepare(self, tokens: Tensor) -> Tensor:
        """Return tokens (B, N, d) as `fit` expects their moments."""
        return tokens

    def fit(self, moments: Moments) -> None:
        """Set buffers from the moments of clean, prepared tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise tokens (B, N, d)."""
        return self.prepare(tokens)


class TokenNorm(Normaliser):
    """`layernorm`: every token goes through an affine-free LayerNorm."""

    def prepare(self, tokens: Tensor) -> Tensor:
        """Apply LayerNorm to tokens (B, N, d)."""
        return F.layer_norm(tokens, tokens.shape[-1:])


class Standardize(Normaliser):
    """`standardize`: each channel gets mean 0 and variance 1 by the statistics of clean tokens.

    Every prefix position has statistics of its own, because CLS is in another part of the space.
    """

    mean: Tensor
    std: Tensor
    prefix_mean: Tensor
    prefix_std: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.register_buffer("mean", torch.zeros(spec.width))
        self.register_buffer("std", torch.ones(spec.width))
        self.register_buffer("prefix_mean", torch.zeros(spec.prefix, spec.width))
        self.register_buffer("prefix_std", torch.ones(spec.prefix, spec.width))

    def fit(self, moments: Moments) -> None:
        """Set mean and standard deviation of patches and of each prefix position."""
        self.mean.copy_(moments.mean)
        self.std.copy_(_deviation(moments.variance))
        self.prefix_mean.copy_(moments.prefix_mean)
        if len(self.prefix_std):
            self.prefix_std.copy_(_deviation(moments.prefix_variance))

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardize tokens (B, N, d)."""
        prefix = len(self.prefix_mean)
        return torch.cat(
            [
                (tokens[:, :prefix] - self.prefix_mean) / self.prefix_std,
                (tokens[:, prefix:] - self.mean) / self.std,
            ],
            dim=1,
        )


class TokenStandardize(Standardize):
    """`layernorm-standardize`: every token goes through an affine-free LayerNorm, and then through `standardize`."""

    def prepare(self, tokens: Tensor) -> Tensor:
        """Apply LayerNorm to tokens (B, N, d)."""
        return F.layer_norm(tokens, tokens.shape[-1:])

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply LayerNorm to tokens (B, N, d), then standardize them."""
        return super().forward(self.prepare(tokens))


class PhiS(Normaliser):
    """`phi-s`: H·Uᵀ(x - mean) / φ. A rotation gives all channels one variance, and errors stay isotropic.

    U are the eigenvectors of the covariance, H is a Hadamard matrix, φ is the root of the mean eigenvalue (PHI-S,
    arXiv 2410.01680). Prefix tokens get the same rotation, each position with its own mean and scale.
    """

    needs_covariance = True
    mean: Tensor
    turn: Tensor
    prefix_mean: Tensor
    prefix_scale: Tensor

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.register_buffer("mean", torch.zeros(spec.width))
        self.register_buffer("turn", hadamard(spec.width).float())  # raises UserError if there is none
        self.register_buffer("prefix_mean", torch.zeros(spec.prefix, spec.width))
        self.register_buffer("prefix_scale", torch.ones(spec.prefix, 1))

    def fit(self, moments: Moments) -> None:
        """Set the rotation, the means and the scales from the whole covariance."""
        values, vectors = torch.linalg.eigh(moments.covariance)
        scale = values.clamp_min(0).mean().sqrt().clamp_min(1e-12)
        self.mean.copy_(moments.mean)
        self.turn.copy_(vectors @ hadamard(len(values)).T / scale)
        self.prefix_mean.copy_(moments.prefix_mean)
        prefix_scale = moments.prefix_variance.mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        self.prefix_scale.copy_(prefix_scale / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rotate and scale tokens (B, N, d)."""
        prefix = len(self.prefix_mean)
        centred = torch.cat(
            [(tokens[:, :prefix] - self.prefix_mean) / self.prefix_scale, tokens[:, prefix:] - self.mean], dim=1
        )
        return centred @ self.turn


def hadamard(d: int) -> Tensor:
    """Build an orthogonal matrix (d, d) float64 with entries ± 1/√d only: Paley's, doubled as often as needed.

    Raises UserError for a width for which this function builds none.
    """
    core, doublings = d, 0
    while core > 1 and not _is_paley(core) and core % 2 == 0:
        core, doublings = core // 2, doublings + 1
    if core != 1 and not _is_paley(core):
        raise UserError(f"refine.normaliser phi-s needs a Hadamard matrix, and none is known here for {d} channels")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    if core > 1:
        q = core - 1
        squares = {n * n % q for n in range(1, q)}
        signs = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, q)], dtype=torch.float64)
        skew = torch.zeros(core, core, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = signs[(torch.arange(q)[:, None] - torch.arange(q)) % q]
        matrix = torch.eye(core, dtype=torch.float64) + skew
    for _ in range(doublings):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    orthogonal: Tensor = matrix / d**0.5
    return orthogonal


def _is_paley(order: int) -> bool:
    """Return whether order - 1 is a prime of the form 4k + 3."""
    q = order - 1
    return q % 4 == 3 and all(q % n for n in range(2, int(q**0.5) + 1))


def _deviation(variance: Tensor) -> Tensor:
    """Return the deviation of channels (..., d), with a floor: rounding noise must not be scaled to unit variance."""
    deviation = variance.sqrt()
    return torch.maximum(deviation, 1e-2 * deviation.mean(-1, keepdim=True) + 1e-12)


NORMALISERS: dict[str, type[Normaliser]] = {
    "standardize": Standardize,
    "layernorm-standardize": TokenStandardize,
    "phi-s": PhiS,
    "layernorm": TokenNorm,
    "none": Normaliser,
}
