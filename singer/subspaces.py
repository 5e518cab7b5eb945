"""Subspaces that the next reader of a block's output hardly sees: where adapters start."""

import torch
from torch import Tensor

from singer.tail import TeacherTail


def reader_weight(tail: TeacherTail, block: int) -> Tensor:
    """The linearised reader (outputs, d) of the output of `block`, acting on column vectors.

    Within the network it is fc2·fc1 of the next block's MLP (the paper's linearisation). The last block is read by the
    final norm and head: head·diag(gamma)·(I - 11ᵀ/d); without a head, by the MLP of its own block, as in the
    authors' code.
    """
    if not tail.is_last(block):
        return _mlp_product(tail, block + 1)
    head, norm = tail.model.head, tail.model.norm
    if isinstance(head, torch.nn.Linear) and isinstance(norm, torch.nn.LayerNorm) and norm.weight is not None:
        folded = head.weight.double() * norm.weight.double()
        centred: Tensor = folded - folded.mean(1, keepdim=True)
        return centred.to(torch.float32)
    return _mlp_product(tail, block)


def smallest_directions(weight: Tensor, rank: int) -> Tensor:
    """Orthonormal input directions (d, rank) with the smallest singular values of weight (outputs, d)."""
    d = weight.shape[1]
    if rank > d:
        raise ValueError(f"refine.rank {rank} is larger than the feature width {d}")
    gram = weight.double().T @ weight.double()
    _, vectors = torch.linalg.eigh(gram)  # ascending
    smallest: Tensor = vectors[:, :rank].float().contiguous()
    return smallest


def _mlp_product(tail: TeacherTail, block: int) -> Tensor:
    mlp = getattr(tail.block(block), "mlp", None)
    if mlp is None or not hasattr(mlp, "fc1") or mlp.fc1.weight.shape[0] != mlp.fc2.weight.shape[1]:
        raise ValueError(f"block {block} of this teacher has no plain fc1/fc2 MLP to take a null space from")
    product: Tensor = mlp.fc2.weight.float() @ mlp.fc1.weight.float()
    return product
