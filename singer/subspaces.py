"""Subspaces of a block's output in which a refiner may move tokens: adapters start in them.

A basis takes the FitContext of a block and a rank r and returns (d, r) orthonormal columns, best first. A new basis is
a function and a line in the registry.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from singer.curvature import curvature
from singer.errors import UserError
from singer.fit_context import FitContext
from singer.suffix import TeacherSuffix

Basis = Callable[[FitContext, int], Tensor]
# The authors' code takes a singular value below this for zero.
OFFICIAL_THRESHOLD = 0.05
# This share of the curvature's mean is added to it before artifact energy is divided by it.
_FLOOR = 1e-2
# best_rank looks at no more directions than this.
_WIDEST = 64


def weights(context: FitContext, rank: int) -> Tensor:
    """Return the smallest singular directions of W̃ = fc2·fc1, the next block's linearised reader (the paper)."""
    return smallest_directions(reader_weight(context.suffix, context.block), rank)


def weights_official(context: FitContext, rank: int, threshold: float = OFFICIAL_THRESHOLD) -> Tensor:
    """Return the r LARGEST singular directions below a threshold, in descending order (the authors' code).

    The last block uses its own W̃. If there are fewer than r, random unit vectors fill up the rest; they are not
    orthogonal to the others.
    """
    suffix, block = context.suffix, context.block
    product = mlp_product(suffix, block if suffix.is_last(block) else block + 1)
    u, values, _ = torch.linalg.svd(product.T)
    found = u[:, values < threshold][:, :rank]
    drawn = torch.randn(len(u), rank - found.shape[1], generator=context.generator()).to(u)
    filled: Tensor = torch.cat([found, drawn / drawn.norm(dim=0)], dim=1).contiguous()
    return filled


def ln_folded(context: FitContext, rank: int) -> Tensor:
    """Return the smallest directions of the next block's branches with its norms folded in.

    For the last block, the reader is the final norm. The branches are stacked: the MLP,
    E[1/σ]·ls2·fc2·diag(E[gelu'])·fc1·diag(γ2)(I - 11ᵀ/d), and the value path of attention,
    E[1/σ]·ls1·proj·V·diag(γ1)(I - 11ᵀ/d).
    """
    suffix, block = context.suffix, context.block
    if suffix.is_last(block):
        return smallest_directions(reader_weight(suffix, block), rank)
    return smallest_directions(_folded_branches(context, suffix.block(block + 1)), rank)


def least_curvature(context: FitContext, rank: int, reader: str) -> Tensor:
    """Return the bottom eigenvectors of the curvature sketch at a reader."""
    _, vectors = torch.linalg.eigh(curvature(context, reader))
    flattest: Tensor = vectors[:, : _checked(rank, len(vectors))].float().contiguous()
    return flattest


def artifact_aware(context: FitContext, rank: int, reader: str = "final-norm") -> Tensor:
    """Return the directions with most artifact energy for the curvature they cost.

    They are the top of A v = λ (C + εI) v, orthonormalised in order.
    """
    cost = curvature(context, reader)
    d = len(cost)
    floor = _FLOOR * cost.diagonal().mean()
    lower = torch.linalg.cholesky(cost + floor * torch.eye(d, dtype=cost.dtype, device=cost.device))
    half = torch.linalg.solve_triangular(lower, context.artifact_energy(), upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    _, vectors = torch.linalg.eigh(whitened)  # ascending
    solved = torch.linalg.solve_triangular(lower.T, vectors.flip(1)[:, : _checked(rank, d)], upper=True)
    directions: Tensor = torch.linalg.qr(solved).Q.float().contiguous()
    return directions


def random(context: FitContext, rank: int) -> Tensor:
    """Draw a random subspace, as a control."""
    d = context.tokens.shape[-1]
    drawn = torch.randn(d, _checked(rank, d), generator=context.generator())
    directions: Tensor = torch.linalg.qr(drawn).Q.contiguous().to(context.tokens.device)
    return directions


BASES: dict[str, Basis] = {
    "weights": weights,
    "weights-official": weights_official,
    "ln-folded": ln_folded,
    "curvature": partial(least_curvature, reader="final-norm"),
    "curvature-next-norm": partial(least_curvature, reader="next-norm"),
    "curvature-branch": partial(least_curvature, reader="branch"),
    "artifact-aware": artifact_aware,
    "random": random,
}


def best_rank(context: FitContext, basis: str) -> tuple[int, list[tuple[float, float]]]:
    """Find the rank r that removes most artifact energy for the drift it costs. Returns (r, curve).

    curve: [(removed, drift)] for 1, 2, ... directions. removed: share of tr A in the span of these directions; drift:
    share of tr C at the final norm in that span. r is where the first is farthest above the second; 1 if there is no
    artifact.
    """
    d = context.tokens.shape[-1]
    directions = BASES[basis](context, min(d, _WIDEST)).double()
    energy, cost = context.artifact_energy(), curvature(context, "final-norm")
    shares = [
        ((directions * (m @ directions)).sum(0).cumsum(0) / m.diagonal().sum().clamp_min(1e-30)).tolist()
        for m in (energy, cost)
    ]
    curve = list(zip(*shares, strict=True))
    gains = [removed - drift for removed, drift in curve]
    return (1 + max(range(len(gains)), key=gains.__getitem__) if float(energy.diagonal().sum()) > 0 else 1), curve


def reader_weight(suffix: TeacherSuffix, block: int) -> Tensor:
    """Return the linearised reader (outputs, d) of the output of `block`; it acts on column vectors.

    Within the network it is fc2·fc1 of the next block's MLP (the paper's linearisation). For the last block it is the
    final norm and head: head·diag(gamma)·(I - 11ᵀ/d). Without a head it is the MLP of the block itself, as in the
    authors' code.
    """
    if not suffix.is_last(block):
        return mlp_product(suffix, block + 1)
    head, norm = suffix.model.head, suffix.model.norm
    if isinstance(head, nn.Linear) and isinstance(norm, nn.LayerNorm) and norm.weight is not None:
        return _centred(head.weight.double() * norm.weight.double()).float()
    return mlp_product(suffix, block)


def smallest_directions(weight: Tensor, rank: int) -> Tensor:
    """Return orthonormal input directions (d, rank) with the smallest singular values of weight (outputs, d)."""
    gram = weight.double().T @ weight.double()
    _, vectors = torch.linalg.eigh(gram)  # ascending
    smallest: Tensor = vectors[:, : _checked(rank, len(gram))].float().contiguous()
    return smallest


def mlp_product(suffix: TeacherSuffix, block: int) -> Tensor:
    """Return fc2·fc1 (d, d) of a plain MLP; for other blocks (gated, parallel), their first linear layers, stacked."""
    module = suffix.block(block)
    mlp = getattr(module, "mlp", None)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features == fc2.in_features:
        product: Tensor = fc2.weight.float() @ fc1.weight.float()
        return product
    return torch.cat(_first_readers(module, block))


def _first_readers(module: nn.Module, block: int) -> list[Tensor]:
    """List the weights of the linear layers that first read a block's input. Raises UserError if none is known."""
    readers = [
        part.weight.float()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and name.rsplit(".", 1)[-1] in ("qkv", "fc1", "fc1_g", "fc1_x", "w12", "in_proj")
    ]
    if not readers:
        raise UserError(f"block {block} of this teacher has no linear layer known to read its input")
    return readers


@torch.no_grad()
def _folded_branches(context: FitContext, module: nn.Module) -> Tensor:
    """Return the linearised branches (outputs, d) of a block.

    For a block that is not plain, they are its first readers after the norm.
    """
    norm1, attention, norm2, mlp = (getattr(module, n, None) for n in ("norm1", "attn", "norm2", "mlp"))
    fc1, fc2, act = (getattr(mlp, n, None) for n in ("fc1", "fc2", "act"))
    plain = isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm) and hasattr(attention, "qkv")
    linear = isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features == fc2.in_features
    if not (plain and linear and act is not None):
        readers = torch.cat(_first_readers(module, context.block + 1)).double()
        norm = next((m for m in module.modules() if isinstance(m, nn.LayerNorm)), None)
        return _centred(readers * norm.weight.double()) if norm is not None else readers
    assert isinstance(attention, nn.Module) and isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm)
    assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
    inputs: dict[str, Tensor] = {}
    hooks = [
        norm1.register_forward_pre_hook(lambda _, args: inputs.update(norm1=args[0])),
        norm2.register_forward_pre_hook(lambda _, args: inputs.update(norm2=args[0])),
        fc1.register_forward_hook(lambda _, __, output: inputs.update(hidden=output)),
    ]
    module(context.tokens)
    for hook in hooks:
        hook.remove()
    hidden = inputs["hidden"][:, context.prefix :].flatten(0, 1)
    with torch.enable_grad():
        probe = hidden.detach().requires_grad_()
        (slope,) = torch.autograd.grad(act(probe).sum(), probe)
    d = context.tokens.shape[-1]
    qkv, proj = (attention.get_parameter(f"{name}.weight").double() for name in ("qkv", "proj"))
    paths = [
        (fc2.weight.double() * slope.double().mean(0)) @ fc1.weight.double() * norm2.weight.double(),
        proj @ qkv[2 * d :] * norm1.weight.double(),
    ]
    scales = [getattr(getattr(module, n, None), "gamma", None) for n in ("ls2", "ls1")]
    folded = []
    for path, gamma, x in zip(paths, scales, (inputs["norm2"], inputs["norm1"]), strict=True):
        spread = x[:, context.prefix :].double().std(-1, correction=0)
        layer_scale = gamma.double().unsqueeze(1) if isinstance(gamma, Tensor) else 1.0
        folded.append((1 / spread).mean() * layer_scale * _centred(path))
    return torch.cat(folded)


def _centred(weight: Tensor) -> Tensor:
    """Return W·(I - 11ᵀ/d), as LayerNorm subtracts the mean of a token's channels."""
    centred: Tensor = weight - weight.mean(1, keepdim=True)
    return centred


def _checked(rank: int, d: int) -> int:
    """Return the rank. Raises UserError if it is larger than the width d."""
    if rank > d:
        raise UserError(f"refine.rank {rank} is larger than the feature width {d}")
    return rank
