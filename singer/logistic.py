"""Multinomial logistic regression in pure torch, for probes of a million features and a thousand classes.

The minimum is that of scikit-learn's LogisticRegression: the summed cross-entropy + |W|² / 2C, without a penalty on
biases. It is found by L-BFGS (Nocedal 1980) in coordinates in which the curvature is nearly the identity: the Hessian
of each class is about a·XᵀX + I/C with a = (1/K)(1 - 1/K), after Böhning (1992).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError

# A pass computes so many logits at once; on a CPU, what its caches hold.
_LOGITS, _LOGITS_ON_CPU = 1 << 24, 1 << 20
_MEMORY = 10
# The fit has converged when another step would lower the loss by less than this share of it.
TOL = 1e-5
_HALVINGS = 12


@dataclass(frozen=True)
class Streamed:
    """Standardised features of which only one block at a time is on the device.

    x: (n, d), anywhere, such as in a mapped file; rows: numbers (m,) of those that count, best ascending; mean, std:
    (d,), on the device.
    """

    x: Tensor
    rows: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, d)."""
        return len(self.rows), self.x.shape[1]

    @property
    def device(self) -> torch.device:
        """Return the device of the blocks."""
        return self.mean.device

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield blocks of so many rows, standardised and on the device."""
        for rows in self.rows.split(size):
            yield (self.x[rows].to(self.device) - self.mean) / self.std


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier. weight: (K, d); bias: (K,); passes: over the features; converged: if not, they ended it."""

    weight: Tensor
    bias: Tensor
    passes: int
    converged: bool

    def scores(self, x: Tensor) -> Tensor:
        """Return the class scores (n, K) of features x (n, d)."""
        return F.linear(x, self.weight, self.bias)


class LogisticProblem:
    """The regression of labels (n,) below `classes` on features x (n, d), which should be standardised.

    All tensors are on one device; curvature is measured once, for all penalties. Every pass reads all blocks
    of Streamed features again.
    """

    def __init__(self, x: Tensor | Streamed, labels: Tensor, classes: int) -> None:
        if classes < 2:
            raise UserError(f"a classifier needs two classes or more, not {classes}")
        self._x, self._labels, self._classes = x, labels, classes
        squares, vectors = torch.linalg.eigh(sum_of_products(x))
        self._squares, self._vectors = squares.clamp_min(0).float(), vectors.float()

    def fit(self, c: float, start: Logistic | None = None, tol: float = TOL, max_passes: int = 300) -> Logistic:
        """Minimise the loss for an inverse penalty C.

        start: a solution nearby; tol: the fit has converged when another step would lower its loss by less than this
        share; max_passes: over the features, after which it ends.
        """
        place = _Coordinates(self._squares, self._vectors, len(self._x), self._classes, c)

        def loss(z: Tensor) -> tuple[float, Tensor]:
            weight, bias = place.outside(z)
            return place.penalised(weight, *self.loss(weight, bias))

        zero = torch.zeros(self._classes, self._x.shape[1] + 1, device=self._x.device)
        z, passes, converged = minimise(loss, zero if start is None else place.inside(start), tol, max_passes)
        return Logistic(*place.outside(z), passes, converged)

    def loss(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the summed cross-entropy of a head, and its gradients by weight and bias."""
        value = torch.zeros((), dtype=torch.float64, device=weight.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        most = _LOGITS_ON_CPU if weight.device.type == "cpu" else _LOGITS
        rows = max(1, most // max(weight.shape))
        for x, labels in zip(self._x.split(rows), self._labels.split(rows), strict=True):
            logits, own = torch.addmm(bias, x, weight.T), labels.unsqueeze(1)
            shares = logits.softmax(1)
            # The logarithm of the sum of exponentials, by the largest share, which is never near 0.
            totals = logits.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log()
            value += (totals - logits.gather(1, own)).sum(dtype=torch.float64)
            error = shares.scatter_add_(1, own, shares.new_full((1, 1), -1.0).expand(own.shape))
            by_weight.addmm_(error.T, x)
            by_bias += error.sum(0)
        return float(value), by_weight, by_bias


class _Coordinates:
    """The coordinates z (K, d + 1) of a head for one inverse penalty C, in which the curvature is nearly the identity.

    squares, vectors: eigenvalues (d,) and eigenvectors (d, d) of XᵀX, where X has `count` rows.
    """

    def __init__(self, squares: Tensor, vectors: Tensor, count: int, classes: int, c: float) -> None:
        share = (1 / classes) * (1 - 1 / classes)
        self._vectors, self._c = vectors, c
        self._scale, self._ones = (share * squares + 1 / c).rsqrt(), (share * count) ** -0.5

    def outside(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head, weight (K, d) and bias (K,), at coordinates z."""
        return (z[:, :-1] * self._scale) @ self._vectors.T, z[:, -1] * self._ones

    def inside(self, head: Logistic) -> Tensor:
        """Return the coordinates of a head."""
        return torch.cat([(head.weight @ self._vectors) / self._scale, (head.bias / self._ones).unsqueeze(1)], 1)

    def penalised(self, weight: Tensor, value: float, by_weight: Tensor, by_bias: Tensor) -> tuple[float, Tensor]:
        """Return the loss with its penalty, and its gradient by z, of a cross-entropy and its gradients."""
        value += float(weight.double().square().sum()) / (2 * self._c)
        by_weight = by_weight + weight / self._c
        return value, torch.cat([(by_weight @ self._vectors) * self._scale, (by_bias * self._ones).unsqueeze(1)], 1)


def sum_of_products(x: Tensor | Streamed) -> Tensor:
    """Return XᵀX (d, d) float64 of features x (n, d)."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(1 << 14):
        total += (part.T @ part).double()
    return total


def minimise(
    loss: Callable[[Tensor], tuple[float, Tensor]], z: Tensor, tol: float, max_passes: int
) -> tuple[Tensor, int, bool]:
    """Minimise a convex function by L-BFGS with backtracking; return the place, the evaluations and if it converged.

    loss: returns the value and the gradient at a place; tol, max_passes: as at LogisticProblem.fit. The first direction
    is the negative gradient.
    """
    value, gradient = loss(z)
    passes, history = 1, deque[tuple[Tensor, Tensor, float]](maxlen=_MEMORY)
    while passes < max_passes:
        direction = -_newton(gradient, history)
        slope = float((gradient.double() * direction).sum())
        if -slope / 2 <= tol * max(abs(value), 1e-12):
            return z, passes, True
        step = 1.0
        for _ in range(_HALVINGS):
            there = z + step * direction
            found, slopes = loss(there)
            passes += 1
            if found <= value + 1e-4 * step * slope:
                break
            # The minimum of the parabola through both values and the slope.
            step *= min(0.5, max(0.1, -slope * step / (2 * (found - value - slope * step))))
        else:  # no step is better within the precision of the numbers
            return z, passes, -slope / 2 <= 100 * TOL * abs(value)
        moved, change = there - z, slopes - gradient
        curvature = float((moved.double() * change).sum())
        if curvature > 0:
            history.append((moved, change, curvature))
        z, value, gradient = there, found, slopes
    return z, passes, False


def _newton(gradient: Tensor, history: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Multiply the gradient by the inverse Hessian that the last steps suggest (the two-loop recursion)."""
    q, factors = gradient.clone(), []
    for moved, change, curvature in reversed(history):
        factors.append(float((moved * q).sum()) / curvature)
        q -= factors[-1] * change
    if history:
        _, change, curvature = history[-1]
        q *= curvature / float(change.square().sum())
    for (moved, change, curvature), factor in zip(history, reversed(factors), strict=True):
        q += (factor - float((change * q).sum()) / curvature) * moved
    return q
