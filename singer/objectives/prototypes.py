"""Classes that the teacher's tokens themselves make, with DINO's loss: cross-entropy to centred assignments.

It stands for the loss of DINO, iBOT and DINOv3's distillation (arXiv 2104.14294, 2111.07832, 2508.10104) where the
teacher's heads are not published, with a codebook as in ProC-KD (arXiv 2212.13180): prototypes are running means of the
teacher's tokens, one set for CLS and one for patches. Assignments are centred by Sinkhorn-Knopp (arXiv 2006.09882).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.all_processes import largest_of_all, of_first, sum_of_all
from singer.objectives.base import LastBlock, ObjectiveContext


class Prototypes(LastBlock):
    """Cross-entropy of the student's assignments to prototypes from the teacher's, on CLS and on patches.

    Of the last matched block; tokens and prototypes are L2-normalised. A batch begins the prototypes: tokens of it, of
    the first process's part, that are drawn at random. Then each moves to the mean of all tokens nearest to it.
    """

    batchwise = True
    count = 1024
    momentum = 0.99
    student_temperature = 0.1
    teacher_temperature = 0.07
    rounds = 3

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.kinds = ("cls", "patches") if context.prefix else ("patches",)
        for kind in self.kinds:
            self.register_buffer(kind, torch.zeros(self.count, context.width))

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"cls", "patches"}: losses (B,). In training, the prototypes move."""
        ours, theirs = (self.parts(x.float()) for x in (student, target))
        losses = {}
        for kind in self.kinds:
            if self.training:
                self.begin(getattr(self, kind), theirs[kind])
            prototypes = getattr(self, kind).clone()  # they move before the backward pass
            scores, wanted = (F.normalize(x, dim=-1) @ prototypes.T for x in (ours[kind], theirs[kind]))
            assigned = sinkhorn(wanted.flatten(0, 1) / self.teacher_temperature, self.rounds, self.training)
            assigned = assigned.view_as(wanted)
            learned = (scores / self.student_temperature).log_softmax(-1)
            losses[kind] = -(assigned * learned).sum(-1).mean(1)
            if self.training:
                self.move(getattr(self, kind), theirs[kind])
        return losses

    def parts(self, tokens: Tensor) -> dict[str, Tensor]:
        """Split tokens (B, N, d) into CLS (B, 1, d), if there is one, and patches."""
        prefix = self.context.prefix
        return {"cls": tokens[:, :prefix], "patches": tokens[:, prefix:]}

    @torch.no_grad()
    def begin(self, prototypes: Tensor, tokens: Tensor) -> None:
        """Take tokens (B, N, d) as prototypes, at random, unless there are some; too few tokens count several times."""
        flat = F.normalize(tokens.flatten(0, 1), dim=-1)
        order = torch.randperm(self.count, device=flat.device) % len(flat)
        # Whether there are some is not asked of a GPU, which would have to be waited for.
        drawn = flat[torch.randperm(len(flat), device=flat.device)[order]]
        prototypes.copy_(of_first(torch.where(prototypes.any(), prototypes, drawn)))

    @torch.no_grad()
    def move(self, prototypes: Tensor, tokens: Tensor) -> None:
        """Move each prototype towards the mean of the tokens (B, N, d) that are nearest to it."""
        flat = F.normalize(tokens.flatten(0, 1), dim=-1)
        nearest = F.one_hot((flat @ prototypes.T).argmax(-1), self.count).to(flat.dtype)
        sums, counts = sum_of_all(nearest.T @ flat), sum_of_all(nearest.sum(0).unsqueeze(1))
        means = sums / counts.clamp_min(1)
        moved = self.momentum * prototypes + (1 - self.momentum) * means
        prototypes.copy_(F.normalize(torch.where(counts > 0, moved, prototypes), dim=-1))


@torch.no_grad()
def sinkhorn(scores: Tensor, rounds: int, together: bool = False) -> Tensor:
    """Return assignments (n, K), rows that add up to 1, in which all K columns have nearly the same mass.

    scores: (n, K), divided by the temperature; together: of the rows of all processes.
    """
    largest = scores.max()
    assigned = (scores - (largest_of_all(largest) if together else largest)).exp()
    for _ in range(rounds):
        mass = assigned.sum(0)
        assigned = assigned / (sum_of_all(mass) if together else mass).clamp_min(1e-12)
        assigned = assigned / assigned.sum(1, keepdim=True).clamp_min(1e-12)
    return assigned
