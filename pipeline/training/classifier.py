"""What fine-tuning trains: a student with a head, by cross-entropy to shares of classes."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch
from pipeline.training.learner import Learner
from pipeline.training.mixing import Mixing
from singer.backbones import freeze_unused


class Classifier(Learner):
    """A student with a head. mixing: mixes the images and labels of a step; None to train on them as they are."""

    def __init__(self, student: Backbone, device: torch.device, mixing: Mixing | None = None) -> None:
        super().__init__(student, device)
        self._mixing = mixing
        freeze_unused(self.student, None, student.image_size)

    def begin_step(self, batch: Batch, per_epoch: int) -> Batch:
        """Mix the batch; its labels are then shares of classes (B, classes), which add up to 1."""
        return batch if self._mixing is None else self._mixing(batch)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return {ce: the mean cross-entropy}, -sum over classes of share · log softmax(logits), and sums.

        These are, in eval mode, {top1: (2,)}: how many images are classified rightly, and how many there are.
        """
        logits = self.student(self.images(batch))
        # Half precision loses small probabilities.
        with torch.autocast(batch.weights.device.type, enabled=False):
            losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        found = {"ce": (losses * batch.weights).sum()}
        if self.training:
            return found, {}
        right = logits.argmax(1) == batch.labels
        return found, {"top1": torch.stack([right.sum(), torch.ones_like(right).sum()])}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, object]:
        """Return {held_out_top1: percent}."""
        right, count = sums["top1"].tolist()
        return {"held_out_top1": 100 * right / count}
