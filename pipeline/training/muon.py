"""Muon with one call for all matrices of a shape, in the precision that the device is fast at."""

from collections import defaultdict
from typing import Any

import timm.optim
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor
from torch.distributed.tensor import DTensor

# The polynomials of Newton-Schulz's five rounds: those that timm names "quintic".
_ROUNDS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Muon(timm.optim.Muon):  # type: ignore[misc]  # timm has no types
    """timm's Muon, faster: its state, its rates and, to rounding, its updates.

    timm makes the update of one matrix after the other orthogonal, in bfloat16. Here the matrices of a shape are one
    batch, which saves a GPU hundreds of small kernels; and CPUs, most of which emulate bfloat16, compute in float32.
    Matrices that FSDP has split are left to timm, and so is all that is no matrix (NAdamW).
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, nesterov=True, betas=(0.9, 0.999))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all weights that have gradients."""
        done: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            alike = defaultdict[Any, dict[Tensor, Tensor]](dict)
            for p in group["params"]:
                if group["use_fallback"] or p.grad is None or isinstance(p, DTensor):
                    continue
                if self.state[p].setdefault("use_muon", _is_matrix(p)):
                    alike[p.shape, p.device, p.dtype][p] = p.grad
            for gradients in alike.values():
                self._update(gradients, group)
                done |= gradients
        # timm passes over weights without a gradient.
        for p in done:
            p.grad = None
        super().step(closure)
        for p, gradient in done.items():
            p.grad = gradient

    def _update(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        """Update weights of one shape (m, ...), as matrices (m, n), by their gradients."""
        weights, steps = list(gradients), list(gradients.values())
        for p in weights:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_lerp_(momenta, steps, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(steps, momenta, group["momentum"])).flatten(2)
        dtype = torch.bfloat16 if ahead.is_cuda else torch.float32
        turned = zeropower_via_newtonschulz(ahead, len(_ROUNDS), _ROUNDS, eps=group["eps"], dtype=dtype)
        rate = group["lr"] * get_lr_scale(turned.shape[1:], group["adjust_lr_fn"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(turned.to(steps[0].dtype).reshape(-1, *weights[0].shape)), alpha=-rate)


def _is_matrix(p: Tensor) -> bool:
    """Return whether a weight gets orthogonal updates, by timm's rules."""
    short, long = sorted((len(p), p.numel() // max(1, len(p)))) if p.ndim > 1 else (0, 0)
    # An axis of one is that of a position embedding or of a depthwise convolution.
    return 1 not in p.shape[:2] and short >= 4 and long <= 128 * short
