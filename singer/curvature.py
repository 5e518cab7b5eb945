"""How strongly a reader of a block's output sees each direction of it: a sketch of C = E[JᵀJ].

J is the Jacobian of a chosen reader by one token. With v ~ N(0, I) on the reader's output, one backward pass gives
u = Jᵀv of every token at once, and E[u uᵀ] = C. Whatever the block is made of (LayerScale, registers, parallel MLPs,
gates) is in it, because the block itself is run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from singer.fit_context import FitContext
from singer.suffix import TeacherSuffix

Reader = Callable[[TeacherSuffix, Tensor, int], Tensor]
_BATCH = 16


def read_branch(tail: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """What the next block adds: all its branches, without the identity path. Of the last block: the final norm."""
    return tail.next_output(tokens, block) - tokens if not tail.is_last(block) else tail.normed(tokens, block)


def read_next_norm(tail: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """The output of the norm that comes first in the next block; of the last block: of the final norm."""
    return tail.next_norm(tokens, block)


def read_final_norm(tail: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """The final normed tokens of the teacher: what everybody downstream sees."""
    return tail.normed(tokens, block)


READERS: dict[str, Reader] = {"branch": read_branch, "next-norm": read_next_norm, "final-norm": read_final_norm}


def curvature(evidence: FitContext, reader: str, draws: int = 1) -> Tensor:
    """Sketch of C (d, d) float64 over the clean patch tokens of the sample; `draws` vectors v an image.

    Clean tokens: that is where refined tokens are to lie, and norms make all directions of an artifact look flat.
    """
    d, generator = evidence.tokens.shape[-1], evidence.generator()
    total = torch.zeros(d, d, dtype=torch.float64, device=evidence.tokens.device)
    count = 0
    clean = evidence.clean
    for tokens, keep in zip(evidence.tokens.split(_BATCH), clean.split(_BATCH), strict=True):
        x = tokens.detach().requires_grad_()
        with torch.enable_grad():
            y = READERS[reader](evidence.tail, x, evidence.block)
        for draw in range(draws):
            v = torch.randn(y.shape, generator=generator).to(y)
            (u,) = torch.autograd.grad(y, x, v, retain_graph=draw + 1 < draws)
            seen = u[:, evidence.prefix :][keep].double()
            total += seen.T @ seen
            count += len(seen)
    return total / max(1, count)
