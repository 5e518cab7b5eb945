"""How strongly a reader of a block's output responds to each direction of it: a sketch of C = E[JᵀJ].

J is the Jacobian of a chosen reader by one token. With v ~ N(0, I) on the reader's output, one backward pass gives
u = Jᵀv of every token at once, and E[u uᵀ] = C. C includes whatever the block is made of (LayerScale, registers,
parallel MLPs, gates), because the block itself is run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from singer.fit_context import FitContext
from singer.suffix import TeacherSuffix, has_first_norm

Reader = Callable[[TeacherSuffix, Tensor, int], Tensor]
_BATCH = 16


def read_branch(suffix: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """Return what the next block adds, without the identity path; after the last block, the final normed tokens."""
    return suffix.next_output(tokens, block) - tokens if not suffix.is_last(block) else suffix.normed(tokens, block)


def read_next_norm(suffix: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """Return the output of the norm that comes first in the next block; after the last block, of the final norm."""
    return suffix.next_norm(tokens, block)


def read_final_norm(suffix: TeacherSuffix, tokens: Tensor, block: int) -> Tensor:
    """Return the final normed tokens of the teacher, which every downstream task reads."""
    return suffix.normed(tokens, block)


READERS: dict[str, Reader] = {"branch": read_branch, "next-norm": read_next_norm, "final-norm": read_final_norm}


def readers_of(suffix: TeacherSuffix, block: int) -> dict[str, Reader]:
    """Return the readers of a block; where blocks norm after their branches only, the next one has no norm to read."""
    normed = suffix.is_last(block) or has_first_norm(suffix.block(block + 1))
    return {name: read for name, read in READERS.items() if normed or name != "next-norm"}


def curvature(context: FitContext, reader: str, draws: int = 1) -> Tensor:
    """Sketch C (d, d) float64 over the clean patch tokens of the sample, with `draws` vectors v for each image.

    Only clean tokens count: refined tokens are to be among them, and norms make all directions of an artifact look
    flat.
    """
    d, generator = context.tokens.shape[-1], context.generator()
    total = torch.zeros(d, d, dtype=torch.float64, device=context.tokens.device)
    count = 0
    clean = context.clean
    for tokens, keep in zip(context.tokens.split(_BATCH), clean.split(_BATCH), strict=True):
        x = tokens.detach().requires_grad_()
        with torch.enable_grad():
            y = READERS[reader](context.suffix, x, context.block)
        for draw in range(draws):
            v = torch.randn(y.shape, generator=generator).to(y)
            (u,) = torch.autograd.grad(y, x, v, retain_graph=draw + 1 < draws)
            rows = u[:, context.prefix :][keep].double()
            total += rows.T @ rows
            count += len(rows)
    return total / max(1, count)
