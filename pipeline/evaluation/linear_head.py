"""A linear probe as the head of a student: what it scores, the student's forward pass then gives.

Fine-tuning that starts from such a head changes good features less than one that starts from a random head (Kumar et
al., arXiv:2202.10054).
"""

import torch
from torch import Tensor

from pipeline.config import EvaluateConfig
from pipeline.data import Images
from pipeline.evaluation.classification import fit_linear
from pipeline.evaluation.feature_rows import empty_rows
from pipeline.evaluation.model_inputs import compute_head
from pipeline.models.backbone import Backbone


def probe_weights(
    student: Backbone, images: Images, classes: int, settings: EvaluateConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Fit a linear probe of what a student's head reads: return weight (classes, width) and bias (classes,).

    A class that no image has gets no weight and the lowest bias. The student is on the device; afterwards it is in eval
    mode.
    """
    student.model.eval()
    read, done = None, 0
    for part in compute_head(student, images, settings, device, 1.0, pre_logits=True):
        read = empty_rows((len(images), part.shape[1])) if read is None else read
        read[done : done + len(part)] = part
        done += len(part)
    assert read is not None
    labels = torch.from_numpy(images.labels).long()
    probe, known, (mean, std) = fit_linear(read, labels, settings, device)
    # The probe reads standardised features, and the head those of the student.
    scaled = probe.weight / std
    offset = probe.bias - scaled @ mean
    weight, bias = scaled.new_zeros(classes, scaled.shape[1]), offset.new_full((classes,), float(offset.min()))
    weight[known], bias[known] = scaled, offset
    return weight, bias
