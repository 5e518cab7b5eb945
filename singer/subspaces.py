"""Subspaces that the next reader of a block's output hardly sees: where adapters start."""

import torch
from torch import Tensor, nn

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
    """fc2·fc1 of a plain MLP; of other blocks (gated, parallel) all that first reads the tokens, stacked."""
    module = tail.block(block)
    mlp = getattr(module, "mlp", None)
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features == fc2.in_features:
        product: Tensor = fc2.weight.float() @ fc1.weight.float()
        return product
    readers = [
        part.weight.float()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and name.rsplit(".", 1)[-1] in ("qkv", "fc1", "fc1_g", "fc1_x", "w12")
    ]
    if not readers:
        raise ValueError(f"block {block} of this teacher has no linear layer known to read its input")
    return torch.cat(readers)
