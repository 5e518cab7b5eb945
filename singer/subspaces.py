"""Subspaces of a block's output in which a refiner may move tokens: adapters start in them.

A basis takes the FitContext of a block and a rank r and returns (d, r) orthonormal columns, best first. A new basis is
a function and a line in the registry.
"""

from collections.abc import Callable

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
# What models of timm and of transformers call linear layers that read a block's input.
_FIRST = (
    "qkv", "fc1", "fc1_g", "fc1_x", "w12", "in_proj", "q_proj", "k_proj", "v_proj", "query", "key", "value",
    "gate_proj", "up_proj",
)  # fmt: skip


def null_space(context: FitContext, rank: int) -> Tensor:
    """Return the smallest singular directions of the next block's W̃ = fc2·fc1: its null space, roughly (the paper)."""
    return smallest_directions(reader_weight(context.suffix, context.block), rank)


def null_space_official(context: FitContext, rank: int, threshold: float = OFFICIAL_THRESHOLD) -> Tensor:
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


def least_curvature(context: FitContext, rank: int) -> Tensor:
    """Return the bottom eigenvectors of the curvature sketch at the final norm."""
    _, vectors = torch.linalg.eigh(curvature(context, "final-norm"))
    flattest: Tensor = vectors[:, : _checked(rank, len(vectors))].float().contiguous()
    return flattest


def artifact_aware(context: FitContext, rank: int) -> Tensor:
    """Return the directions with most artifact energy for the curvature they cost.

    They are the top of A v = λ (C + εI) v, orthonormalised in order.
    """
    energy, cost = context.artifact_energy(), curvature(context, "final-norm")
    d = len(cost)
    floor = _FLOOR * cost.diagonal().mean()
    lower = torch.linalg.cholesky(cost + floor * torch.eye(d, dtype=cost.dtype, device=cost.device))
    half = torch.linalg.solve_triangular(lower, energy, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    _, vectors = torch.linalg.eigh(whitened)  # ascending
    solved = torch.linalg.solve_triangular(lower.T, vectors.flip(1)[:, : _checked(rank, d)], upper=True)
    directions: Tensor = torch.linalg.qr(solved).Q.float().contiguous()
    return directions


def artifact(context: FitContext, rank: int) -> Tensor:
    """Return the directions with most artifact energy: the top eigenvectors of A. No suffix is needed."""
    _, vectors = torch.linalg.eigh(context.artifact_energy())  # ascending
    most: Tensor = vectors.flip(1)[:, : _checked(rank, len(vectors))].float().contiguous()
    return most


def random(context: FitContext, rank: int) -> Tensor:
    """Draw a random subspace, as a control."""
    d = context.tokens.shape[-1]
    drawn = torch.randn(d, _checked(rank, d), generator=context.generator())
    directions: Tensor = torch.linalg.qr(drawn).Q.contiguous().to(context.tokens.device)
    return directions


BASES: dict[str, Basis] = {
    "weights": null_space,
    "weights-official": null_space_official,
    "curvature": least_curvature,
    "artifact": artifact,
    "artifact-aware": artifact_aware,
    "random": random,
}


# These run the teacher's blocks; the others read weights or features alone.
CURVED = ("curvature", "artifact-aware")


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
        if isinstance(part, nn.Linear) and name.rsplit(".", 1)[-1] in _FIRST
    ]
    if not readers:
        raise UserError(f"block {block} of this teacher has no linear layer known to read its input")
    return readers


def _centred(weight: Tensor) -> Tensor:
    """Return W·(I - 11ᵀ/d), as LayerNorm subtracts the mean of a token's channels."""
    centred: Tensor = weight - weight.mean(1, keepdim=True)
    return centred


def _checked(rank: int, d: int) -> int:
    """Return the rank. Raises UserError if it is larger than the width d."""
    if rank > d:
        raise UserError(f"refine.rank {rank} is larger than the feature width {d}")
    return rank
