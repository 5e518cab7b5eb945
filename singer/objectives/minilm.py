"""Relations in the student's own attention (MiniLM, arXiv 2002.10957 and 2012.15828; TinyMIM, 2301.01296).

The student's queries, keys and values are those of its block after a matched one; the teacher's are recomputed from the
cached input of the block after a cached one. Nothing is projected, because relations need no common width.
"""

import math

from torch import Tensor

from singer.objectives.relation import Relation, relation_kl, split


class MiniLm(Relation):
    """KL of the student's softmax(A·Bᵀ / √width) from the teacher's, mean over kinds of (A, B), heads and queries.

    MiniLMv2: the kinds are QQ, KK and VV. Both sides are split into as many relation heads as divide the student's
    width and the teacher's number of heads.
    """

    own_attention = True
    name = "minilm"

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block: student (B, N, 3 · its width), Q, K and V; target (B, N, d), tokens."""
        width = student.shape[-1] // 3
        count = math.gcd(self.attention(block).num_heads, width)  # type: ignore[arg-type]
        return relation_kl(split(student, count), split(self.mixed(target, block), count), self.kinds)


class TinyMim(MiniLm):
    """The same of QK and VV, as in TinyMIM and in MiniLMv1."""

    name = "tinymim"
    kinds = (("q", "k"), ("v", "v"))
