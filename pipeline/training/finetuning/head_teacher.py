"""A classifier that teaches in fine-tuning: its class probabilities for the very views that the student sees."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import FinetuneConfig
from pipeline.data.views import channel_moments, standardise
from pipeline.models.backbone import Backbone
from pipeline.models.loading import frozen
from singer.sizes import Size


class HeadTeacher:
    """A frozen model with a head. It is no module, so that nothing takes it for a part of the student.

    classes: for each label, the class of the head, or -1 if it has none, so that the label gets no probability; weight:
    the share of the loss (finetune.kd_weight).
    """

    def __init__(
        self, teacher: Backbone, classes: Sequence[int], settings: FinetuneConfig, device: torch.device
    ) -> None:
        self._model, self._dtype = frozen(teacher).model.to(device), teacher.dtype
        self._size, self._moments = Size.of(teacher.image_size), channel_moments(teacher.mean, teacher.std, device)
        self._classes = torch.tensor(classes, device=device)
        self.weight, self._hard, self._temperature = settings.kd_weight, settings.kd == "hard", settings.kd_temperature

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Return what the head says of views (B, H, W, 3), 0 to 255: (B, classes) float32, in the order of the labels.

        Views of another size are resized to the teacher's own on their device.
        """
        if pixels.shape[1:3] != (self._size.height, self._size.width):
            images = pixels.permute(0, 3, 1, 2).float()
            images = F.interpolate(images, (self._size.height, self._size.width), mode="bicubic", antialias=True)
            pixels = images.clamp(0, 255).permute(0, 2, 3, 1)
        found: Tensor = self._model(standardise(pixels, self._moments).to(self._dtype))
        known = self._classes >= 0
        return found.float()[:, self._classes.clamp_min(0)].masked_fill(~known, -torch.inf)

    def losses(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Return the losses (B,) of the student's logits (B, classes) for the teacher's, both float32.

        soft: the square of the temperature times the KL divergence of the student's probabilities from the teacher's,
        both at that temperature (arXiv:1503.02531); hard: cross-entropy to the teacher's first class
        (arXiv:2012.12877).
        """
        if self._hard:
            return F.cross_entropy(logits, wanted.argmax(1), reduction="none")
        t = self._temperature
        divergence = F.kl_div((logits / t).log_softmax(1), (wanted / t).softmax(1), reduction="none").sum(1)
        return t * t * divergence
