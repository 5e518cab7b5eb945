"""The teacher's class probabilities, recomputed from the cached last block through its frozen norm and head.

No labels are needed (SSLD, arXiv 2103.05959; MEAL V2, arXiv 2009.08453; TinyViT, arXiv 2207.10666).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.errors import UserError
from singer.objectives.base import LastBlock, ObjectiveContext


class Logits(LastBlock):
    """KL of the class probabilities that the teacher's head gives for the student's tokens from those for its own."""

    in_teacher_units = True

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.check()
        if not context.prefix and self.suffix.model.global_pool == "token":
            raise UserError("distill.objective logits needs a student with a class token: the teacher's head reads it")

    def check(self) -> None:
        """Raise UserError unless the teacher's last block is cached and has a head on it."""
        model = self.suffix.model
        if not self.suffix.is_last(self.block) or not getattr(model, "num_classes", 0):
            raise UserError("distill.objective logits needs the teacher's last block in the cache, and a head on it")

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"kl": losses (B,)}."""
        ours, theirs = (self.verdict(x) for x in (student, target))
        return {"kl": F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)}

    def verdict(self, tokens: Tensor) -> Tensor:
        """Compute log probabilities (B, classes) for tokens (B, [CLS +] patches, d)."""
        return self.output(tokens).log_softmax(-1)

    def output(self, tokens: Tensor) -> Tensor:
        """Compute what the teacher would give, (B, classes) or embeddings, for tokens (B, [CLS +] patches, d)."""
        # Heads that pool patches skip the teacher's prefix tokens; their values do not matter.
        missing = self.context.teacher_prefix - self.context.prefix
        cls, patches = tokens[:, : self.context.prefix], tokens[:, self.context.prefix :]
        whole = torch.cat([cls, patches.new_zeros(len(tokens), missing, tokens.shape[-1]), patches], dim=1)
        return self.suffix.logits(whole, self.block)
