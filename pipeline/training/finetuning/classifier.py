"""What fine-tuning trains: a student with a head, by cross-entropy to shares of classes, and perhaps to a teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch
from pipeline.training.finetuning.head_teacher import HeadTeacher
from pipeline.training.finetuning.mixing import Mixing
from pipeline.training.learner import Learner
from singer.backbones import freeze_unused


class Classifier(Learner):
    """A student with a head.

    mixing: mixes the images and labels of a step; None to train on them as they are; teacher: whose class probabilities
    the student learns, too; None to learn from labels alone.
    """

    def __init__(
        self,
        student: Backbone,
        device: torch.device,
        mixing: Mixing | None,
        teacher: HeadTeacher | None,
    ) -> None:
        super().__init__(student, device)
        self._mixing, self._teacher = mixing, teacher
        freeze_unused(self.student, None, student.image_size)

    def begin_step(self, batch: Batch, per_epoch: int) -> Batch:
        """Mix the batch; its labels are then shares of classes (B, classes), which add up to 1."""
        return batch if self._mixing is None else self._mixing(batch)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return {ce: the mean cross-entropy}, -sum over classes of share · log softmax(logits), and sums.

        With a teacher, in training, these are {ce: (1 - kd_weight) · ce, kd: kd_weight · HeadTeacher.losses}. The sums
        are, in eval mode, {top1: (2,)}: how many images are classified rightly, and how many there are.
        """
        logits = self.student(self.images(batch))
        teacher = self._teacher if self.training else None
        wanted = teacher.logits(batch.pixels[self._size]) if teacher is not None else None
        # Half precision loses small probabilities.
        with torch.autocast(batch.weights.device.type, enabled=False):
            losses = {"ce": F.cross_entropy(logits.float(), batch.labels, reduction="none")}
            if teacher is not None and wanted is not None:
                kd = teacher.losses(logits.float(), wanted)
                losses = {"ce": (1 - teacher.weight) * losses["ce"], "kd": teacher.weight * kd}
        found = {name: (loss * batch.weights).sum() for name, loss in losses.items()}
        if self.training:
            return found, {}
        right = logits.argmax(1) == batch.labels
        return found, {"top1": torch.stack([right.sum(), torch.ones_like(right).sum()])}

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, object]:
        """Return {held_out_top1: percent}."""
        right, count = sums["top1"].tolist()
        return {"held_out_top1": 100 * right / count}
