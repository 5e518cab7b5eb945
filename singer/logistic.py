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

# A pass computes so many logits at once.
_LOGITS = 1 << 24
_MEMORY = 10
# The fit has converged when another step would lower the loss by less than this share of it.
_GAIN = 1e-5
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

    All tensors are on one device; curvature is measured once, for all strengths. Every pass reads all blocks
    of Streamed features again.
    """

    def __init__(self, x: Tensor | Streamed, labels: Tensor, classes: int) -> None:
        self._x, self._labels, self._classes = x, labels, classes
        squares, vectors = torch.linalg.eigh(sum_of_products(x))
        self._squares, self._vectors = squares.clamp_min(0).float(), vectors.float()

    def fit(self, strength: float, start: Logistic | None = None, most: int = 300) -> Logistic:
        """Minimise the loss for an inverse penalty C = `strength`. start: a solution nearby; most: passes."""
        share = (1 / self._classes) * (1 - 1 / self._classes)
        scale = (share * self._squares + 1 / strength).rsqrt()
        ones = (share * len(self._x)) ** -0.5
        d = self._x.shape[1]

        def original(z: Tensor) -> tuple[Tensor, Tensor]:
            """Return weight (K, d) and bias (K,) at coordinates z (K, d + 1)."""
            return (z[:, :d] * scale) @ self._vectors.T, z[:, d] * ones

        def loss(z: Tensor) -> tuple[float, Tensor]:
            """Return the loss at coordinates z, and its gradient."""
            weight, bias = original(z)
            value, by_weight, by_bias = self._pass(weight, bias)
            value += float(weight.double().square().sum()) / (2 * strength)
            by_weight += weight / strength
            return value, torch.cat([(by_weight @ self._vectors) * scale, (by_bias * ones).unsqueeze(1)], 1)

        z = torch.zeros(self._classes, d + 1, device=self._x.device)
        if start is not None:
            z = torch.cat([(start.weight @ self._vectors) / scale, (start.bias / ones).unsqueeze(1)], 1)
        z, passes, converged = minimise(loss, z, most)
        return Logistic(*original(z), passes, converged)

    def _pass(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the summed cross-entropy, and its gradients by weight and bias."""
        value = torch.zeros((), dtype=torch.float64, device=weight.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, _LOGITS // max(self._classes, weight.shape[1]))
        for x, labels in zip(self._x.split(rows), self._labels.split(rows), strict=True):
            logits = torch.addmm(bias, x, weight.T)
            logits -= logits.amax(1, keepdim=True)
            own = logits.gather(1, labels.unsqueeze(1))
            # The memory of the logits becomes that of the gradient.
            sums = logits.exp_().sum(1, keepdim=True)
            value += (sums.log() - own).sum(dtype=torch.float64)
            error = logits.div_(sums)
            error.scatter_add_(1, labels.unsqueeze(1), torch.full_like(own, -1))
            by_weight.addmm_(error.T, x)
            by_bias += error.sum(0)
        return float(value), by_weight, by_bias


def sum_of_products(x: Tensor | Streamed) -> Tensor:
    """Return XᵀX (d, d) float64 of features x (n, d)."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(1 << 14):
        total += (part.T @ part).double()
    return total


def minimise(loss: Callable[[Tensor], tuple[float, Tensor]], z: Tensor, most: int) -> tuple[Tensor, int, bool]:
    """Minimise a convex function by L-BFGS with backtracking; return the place, the evaluations and if it converged.

    loss: returns a value and a gradient of z's shape. The first direction is the negative gradient.
    """
    value, gradient = loss(z)
    passes, history = 1, deque[tuple[Tensor, Tensor, float]](maxlen=_MEMORY)
    while passes < most:
        direction = -_newton(gradient, history)
        slope = float((gradient.double() * direction).sum())
        if -slope / 2 <= _GAIN * max(abs(value), 1e-12):
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
            return z, passes, -slope / 2 <= 100 * _GAIN * abs(value)
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
