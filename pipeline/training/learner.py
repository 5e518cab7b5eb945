"""What a stage trains: a student, and whatever computes its losses. The loop knows no more than this."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch


class Learner(nn.Module):
    """A student with all that is trained with it. Called with a batch, it returns named scalar losses.

    Their sum is minimised. The student is on `device` when it is trained.
    """

    def __init__(self, student: Backbone, device: torch.device) -> None:
        super().__init__()
        self.student = student.model
        # Convolutions on a GPU take channels-last tensors without converting them.
        maps = not student.gives_tokens and device.type == "cuda"
        self.memory_format = torch.channels_last if maps else torch.contiguous_format
        if maps:
            self.student.to(memory_format=torch.channels_last)

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses."""

    def begin_step(self, step: int, per_epoch: int) -> None:
        """Prepare for a step, given its number and the steps in an epoch."""

    def decoded(self, batch: Batch) -> Batch:
        """Return a batch that can be split."""
        return batch

    @abstractmethod
    def measured(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses, and sums {name: tensor} that add up over batches; call it in eval mode only."""

    @abstractmethod
    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, object]:
        """Return the figures of held-out images, from the sums of all batches of them."""
