"""Proteus' losses of what the student sees (arXiv 2407.10366, section 3.2)."""

from torch import Tensor

from singer.objectives.base import LastBlock


class Proteus(LastBlock):
    """Mean squared errors of CLS, and of all tokens, of the last block, with equal weights.

    The paper's third loss, of masked patches, comes with distill.mask_share and has this weight, too. Its heads are
    LayerNorm and a linear layer, one for each loss, after the student's final norm; here they are distill.projector.
    """

    tokenwise = True

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"cls", "tokens": losses (B,)} of tokens (B, N, d); without a class token, only the latter."""
        error = (student - target).square().mean(2)
        losses = {"tokens": error.mean(1)}
        return {"cls": error[:, 0], **losses} if self.context.prefix else losses
