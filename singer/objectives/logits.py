"""The teacher's class probabilities, recomputed from the cached last block through its frozen norm and head.

No labels are needed (SSLD, arXiv 2103.05959; MEAL V2, arXiv 2009.08453; TinyViT, arXiv 2207.10666).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError
from singer.objectives.base import LastBlock, ObjectiveContext


class Logits(LastBlock):
    """KL of the class probabilities that the teacher's head gives for the student's tokens from those for its own."""

    # As it is registered, for messages.
    name = "logits"
    in_teacher_units = True

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.check()
        self.check_reads()

    def check(self) -> None:
        """Raise UserError unless the teacher's last block is cached and has a head on it."""
        model = self.suffix.model
        if not self.suffix.is_last(self.block) or not getattr(model, "num_classes", 0):
            raise UserError(
                f"distill.objective {self.name} needs the teacher's last block in the cache, and a head on it"
            )

    @torch.no_grad()
    def check_reads(self) -> None:
        """Raise UserError if the teacher's head reads tokens that are not there, found by changing them."""
        context, generator = self.context, torch.Generator().manual_seed(0)
        patches = 4 if context.grid is None else math.prod(context.grid)
        tokens = torch.randn(2, context.teacher_prefix + patches, context.width, generator=generator)
        tokens = tokens.to(next(self.suffix.parameters()).device)
        present = torch.cat([tokens[:, : context.prefix], tokens[:, context.teacher_prefix :]], 1)
        whole, ours = self.suffix.logits(tokens, self.block), self.output(present)
        if not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3 * float(whole.std())):
            if not context.prefix and self.suffix.model.global_pool == "token":
                raise UserError(
                    f"distill.objective {self.name} needs a student with a class token: the teacher's head reads it"
                )
            raise UserError(
                f"distill.objective {self.name}: the teacher's head reads prefix tokens that the student does not "
                "have; use an objective that compares tokens, such as mse"
            )
        if context.grid is not None:
            return
        fewer = self.output(present[:, : context.prefix + patches // 2])
        if not torch.allclose(fewer, ours, rtol=1e-3, atol=1e-3 * float(ours.std())):
            raise UserError(
                f"distill.objective {self.name}: the teacher's head reads all patches, and some are left out; set "
                "distill.token_share=1, with a cache of all (cache.token_share=1)"
            )

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"kl": losses (B,)}."""
        ours, theirs = (self.log_probs(x) for x in (student, target))
        return {"kl": F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)}

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Compute log probabilities (B, classes) for tokens (B, [CLS +] patches, d)."""
        return self.output(tokens).log_softmax(-1)

    def output(self, tokens: Tensor) -> Tensor:
        """Compute what the teacher would give, (B, classes) or embeddings, for tokens (B, [CLS +] patches, d)."""
        # The head skips the prefix tokens that the student does not have (check_reads).
        missing = self.context.teacher_prefix - self.context.prefix
        cls, patches = tokens[:, : self.context.prefix], tokens[:, self.context.prefix :]
        whole = torch.cat([cls, patches.new_zeros(len(tokens), missing, tokens.shape[-1]), patches], dim=1)
        return self.suffix.logits(whole, self.block)
