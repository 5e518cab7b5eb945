"""How near an untrained student is to a teacher: scores that rank students without training them.

DisWOT (arXiv 2303.15678) adds two distances between relations of one batch, which need no common width: of samples to
each other (as in similarity-preserving distillation, arXiv 1907.09682), and of class activation maps. A student without
a class head has no such maps; similarities between its patches stand for them here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from singer.adapter_losses import cosine_gram


def sample_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference, a scalar, of the relations of samples (n, d) and (n, e) to each other.

    A relation is a row of the Gram matrix, with a norm of 1.
    """
    ours, theirs = (F.normalize(x @ x.T, dim=-1) for x in (student, teacher))
    return (ours - theirs).square().mean()


def patch_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference, a scalar, of the cosines between patches (n, N, d) and (n, N, e)."""
    return (cosine_gram(student) - cosine_gram(teacher)).square().mean()


def gradient_norm(loss: Tensor, model: nn.Module) -> float:
    """Return the L2 norm of the gradient of a loss in all of a model's parameters (arXiv 2101.08134)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return float(torch.stack([g.double().square().sum() for g in found if g is not None]).sum().sqrt())
