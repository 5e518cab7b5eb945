"""What a stage trains: a student, and whatever computes its losses. The loop knows no more than this."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.data.views import channel_moments, standardise
from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch

TOKENS = "tokens"


class Learner(nn.Module):
    """A student with all that is trained with it. Called with a batch, it returns named scalar losses, and sums.

    The sum of the losses is minimised. The student is on `device` when it is trained.
    """

    def __init__(self, student: Backbone, device: torch.device) -> None:
        super().__init__()
        self.student = student.model
        self._size = student.image_size
        # As a plain attribute: FSDP and DDP, which look after parameters and buffers, have nothing to do with it.
        self._moments = channel_moments(student.mean, student.std, device)
        # Convolutions on a GPU take channels-last tensors without converting them.
        maps = not student.gives_tokens and device.type == "cuda"
        self.memory_format = torch.channels_last if maps else torch.contiguous_format
        if maps:
            self.student.to(memory_format=torch.channels_last)

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return named scalar losses, and {name: tensor}, in eval mode alone: sums that add up over batches.

        TOKENS is what the student says of each image as a whole, (B, d), if k-NN on it tells more than the figures.
        """

    def images(self, batch: Batch) -> Tensor:
        """Return the images of a batch, normalised for the student, (B, 3, H, W)."""
        return standardise(batch.pixels[self._size], self._moments).contiguous(memory_format=self.memory_format)

    def begin_step(self, batch: Batch, per_epoch: int) -> Batch:
        """Prepare for a step on the whole batch of a process; return that batch. per_epoch: the steps in an epoch."""
        return batch

    def decoded(self, batch: Batch) -> Batch:
        """Return a batch whose features are decoded, so that it can be split, or shared with other students."""
        return batch

    @abstractmethod
    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, object]:
        """Return the figures of held-out images, from the sums over all batches of them."""
