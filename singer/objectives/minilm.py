"""Relations in the student's own attention (MiniLM, arXiv 2002.10957 and 2012.15828; TinyMIM, 2301.01296).

The student's queries, keys and values are those of its block after a matched one; the teacher's are recomputed from the
cached input of the block after a cached one. Nothing is projected, because relations need no common width.
"""

import math

from torch import Tensor

from singer.objectives.relation import Relation


class MiniLm(Relation):
    """KL of the student's softmax(A·Bᵀ / √width) from the teacher's, mean over kinds of (A, B), heads and queries.

    MiniLMv2: the kinds are QQ, KK and VV. Both sides are split into as many relation heads as divide the student's
    width and the teacher's number of heads.
    """

    own_attention = True
    name = "minilm"
    kinds: tuple[tuple[str, str], ...] = (("q", "q"), ("k", "k"), ("v", "v"))

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block: student (B, N, 3 · its width), Q, K and V; target (B, N, d), tokens."""
        width = student.shape[-1] // 3
        count = math.gcd(self.attention(block).num_heads, width)  # type: ignore[arg-type]
        ours, theirs = split(student, count), split(self.mixed(target, block), count)
        losses = []
        for a, b in self.kinds:
            learned, wanted = (
                (x[a] / x[a].shape[-1] ** 0.5 @ x[b].transpose(-1, -2)).log_softmax(-1) for x in (ours, theirs)
            )
            losses.append((wanted.exp() * (wanted - learned)).sum(-1).mean(dim=(1, 2)))
        total: Tensor = sum(losses[1:], losses[0]) / len(losses)
        return total


class TinyMim(MiniLm):
    """The same of QK and VV, as in TinyMIM and in MiniLMv1."""

    name = "tinymim"
    kinds = (("q", "k"), ("v", "v"))


def split(mixed: Tensor, heads: int) -> dict[str, Tensor]:
    """Split (B, N, 3 · width) into {"q", "k", "v"}: (B, heads, N, width / heads)."""
    parts = mixed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return {"q": parts[0], "k": parts[1], "v": parts[2]}
