"""The distillation loss of lightly-train (its method "distillation", version 3): similarities instead of features.

Images are compared with a queue of earlier ones, and patches with the patches of the same image. The queue holds the
teacher's mean patches, of all processes; it is filled by training, and empty places do not count.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.all_processes import rows_of_all
from singer.objectives.base import LastBlock, ObjectiveContext


class Queue(LastBlock):
    """KL of softmaxed cosine similarities: of images to a queue of images, and of an image's patches to each other.

    Of the last matched block. It needs no projector that is right in scale: all tokens are L2-normalised.
    """

    batchwise = True
    temperature = 0.07
    size = 8192

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.register_buffer("queue", torch.zeros(self.size, context.width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {"images", "patches"}: losses (B,). The teacher's mean patches then go into the queue."""
        prefix = self.context.prefix
        ours, theirs = (F.normalize(x[:, prefix:].float(), dim=-1) for x in (student, target))
        patches = self.divergence(ours @ ours.transpose(1, 2), theirs @ theirs.transpose(1, 2)).mean(1)
        image, wanted = (F.normalize(x[:, prefix:].float().mean(1), dim=-1) for x in (student, target))
        # The batch itself is there too, so that the first step has something to compare with.
        batch = rows_of_all(wanted) if self.training else wanted
        known = torch.cat([batch, self.queue])  # type: ignore[list-item]
        empty = torch.arange(len(known), device=known.device) >= len(batch) + self.filled.clamp(max=self.size)  # type: ignore[operator]
        images = self.divergence(*((x @ known.T).masked_fill(empty, -torch.inf) for x in (image, wanted)))
        if self.training:
            self.push(batch)
        return {"images": images, "patches": patches}

    def divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Compute the KL of softmaxed similarities from the teacher's, over the last dimension."""
        learned, wanted = ((x / self.temperature).log_softmax(-1) for x in (ours, theirs))
        # Where a place is empty, both are minus infinity.
        return (wanted.exp() * (wanted - learned).masked_fill(wanted.isinf(), 0)).sum(-1)

    @torch.no_grad()
    def push(self, images: Tensor) -> None:
        """Replace the oldest places of the queue by embeddings (B, d)."""
        images = images[-self.size :]
        places = (self.filled + torch.arange(len(images), device=images.device)) % self.size  # type: ignore[operator]
        self.queue.index_copy_(0, places, images)  # type: ignore[operator]
        self.filled.add_(len(images))  # type: ignore[operator]
