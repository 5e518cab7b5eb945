"""Relations between tokens as a frozen block of the teacher sees them (MiniLM, arXiv 2012.15828; TinyMIM, 2301.01296).

The block after a cached one reads the cached features and, through the same frozen norm and qkv, the student's
projected tokens. Any student can learn this way, also one without attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singer.errors import UserError
from singer.objectives.base import Objective, ObjectiveContext
from singer.suffix import first_norm


class Relation(Objective):
    """KL of softmax(A·Aᵀ / √(d / heads)) of the student from the teacher's, mean over kinds, heads and queries.

    The kinds of A are queries, keys and values, as in MiniLMv2.
    """

    in_teacher_units = True
    name = "relation"
    kinds: tuple[tuple[str, str], ...] = (("q", "q"), ("k", "k"), ("v", "v"))

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.blocks = [b for b in context.blocks if not self.suffix.is_last(b)]
        if not self.blocks:
            raise UserError(
                f"distill.objective {self.name} reads cached features with the block after them, and only the last "
                "block is cached; cache an intermediate one"
            )
        for block in self.blocks:
            attention = getattr(self.suffix.block(block + 1), "attn", None)
            if not makes_attention(attention):
                raise UserError(f"distill.objective {self.name} needs a teacher that has attn.qkv in its blocks")
            first_norm(self.suffix.block(block + 1))  # raises UserError if there is none

    def reads(self) -> tuple[int, ...]:
        """Return the blocks that have a block after them."""
        return tuple(self.blocks)

    def forward(
        self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {block: losses (B,)}."""
        return {str(b): self.block_loss(student[b], targets[b], b) for b in self.blocks}

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute the mean KL (B,) over kinds, heads and queries of one block's tokens (B, N, d)."""
        return relation_kl(self.heads(student, block), self.heads(target, block), self.kinds)

    def heads(self, tokens: Tensor, block: int) -> dict[str, Tensor]:
        """Return {"q", "k", "v"}: (B, heads, N, d / heads) that block + 1 makes of tokens (B, N, d)."""
        return split(self.mixed(tokens, block), self.attention(block).num_heads)  # type: ignore[arg-type]

    def attention(self, block: int) -> nn.Module:
        """Return the teacher's attention that reads the output of a block."""
        found: nn.Module = self.suffix.block(block + 1).attn  # type: ignore[assignment]
        return found

    def mixed(self, tokens: Tensor, block: int) -> Tensor:
        """Compute queries, keys and values (B, N, 3 · d) that block + 1 makes of tokens (B, N, d)."""
        return queries_keys_values(self.attention(block), self.suffix.next_norm(tokens, block))


def makes_attention(attention: Any) -> bool:
    """Return whether an attention makes queries, keys and values together, in heads."""
    return callable(getattr(attention, "qkv", None)) and hasattr(attention, "num_heads")


def queries_keys_values(attention: Any, x: Tensor) -> Tensor:
    """Compute an attention's queries, keys and values (B, N, 3 · width) of its input (B, N, d).

    Biases that are kept apart (BEiT, EVA) and norms of queries and keys belong to it; rotary positions do not.
    """
    mixed: Tensor = attention.qkv(x)
    queries, values = getattr(attention, "q_bias", None), getattr(attention, "v_bias", None)
    if queries is not None and values is not None:
        mixed = mixed + torch.cat([queries, torch.zeros_like(queries), values])  # keys have no bias
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    parts = list(mixed.unflatten(-1, (3, attention.num_heads, -1)).unbind(2))
    parts[:2] = [x if norm is None else norm(x) for x, norm in zip(parts, norms, strict=False)]
    return torch.stack(parts, 2).flatten(2)


def relation_kl(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], kinds: Sequence[tuple[str, str]]) -> Tensor:
    """Compute the KL (B,) of softmax(A·Bᵀ / √width) from the teacher's, mean over kinds (A, B), heads and queries.

    ours, theirs: queries, keys and values, {"q", "k", "v"}: (B, heads, N, width), the student's and the teacher's.
    """
    losses = []
    for a, b in kinds:
        learned, wanted = (
            (x[a] / x[a].shape[-1] ** 0.5 @ x[b].transpose(-1, -2)).log_softmax(-1) for x in (ours, theirs)
        )
        losses.append((wanted.exp() * (wanted - learned)).sum(-1).mean(dim=(1, 2)))
    total: Tensor = sum(losses[1:], losses[0]) / len(losses)
    return total


def split(mixed: Tensor, heads: int) -> dict[str, Tensor]:
    """Split (B, N, 3 · width) into {"q", "k", "v"}: (B, heads, N, width / heads)."""
    parts = mixed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return {"q": parts[0], "k": parts[1], "v": parts[2]}
