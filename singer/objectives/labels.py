"""Cross-entropy on labels, where images have them."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from singer.errors import UserError
from singer.objectives.base import LastBlock, ObjectiveContext


class Labels(LastBlock):
    """Cross-entropy of a linear head on CLS (without CLS, on the mean patch) of the last matched block.

    The head is trained with the student. Images without a label (negative) have no loss.
    """

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        if context.classes is None:
            raise UserError("distill.objective labels needs a cache of labelled images (NAME.cls beside NAME.jpg)")
        if context.classes < 2:
            raise UserError(
                "distill.objective labels teaches nothing here: all labels of the cache are of one class; take another "
                "objective"
            )
        self.head = nn.Linear(context.width, context.classes)

    def forward(
        self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"ce": losses (B,)}."""
        assert labels is not None
        tokens = student[self.block]
        pooled = tokens[:, 0] if self.context.prefix else tokens.mean(1)
        losses = F.cross_entropy(self.head(pooled), labels.clamp_min(0), reduction="none")
        return {"ce": losses * (labels >= 0)}
