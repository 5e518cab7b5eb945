"""The optimiser of a student: Muon for its matrices, or AdamW for all weights."""

import torch
from torch import nn

from pipeline.config import TrainingConfig
from pipeline.training.muon import Muon
from pipeline.training.parameter_groups import decay_groups


def new_optimiser(model: nn.Module, settings: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return an optimiser of a student (model.student) and what is trained with it, which are on `device`.

    Muon (Jordan et al., 2024, as timm has it) makes the update of a matrix orthogonal, so that all its directions are
    learnt alike, and as large as AdamW's (arXiv:2502.16982), so that both take the same rates. Weights that do not
    decay, such as norms, tokens and positions, have the update of NAdamW, and so have small or very long matrices. A
    layer_decay "auto" is 1 here: only who knows the start of the student can apply its rule (schedule.layer_decay).
    """
    groups = decay_groups(model, 1.0, 1.0 if settings.layer_decay == "auto" else settings.layer_decay)
    for group in groups:
        if settings.optimizer == "muon":
            group["use_fallback"] = group["weight_decay"] == 0
        group["weight_decay"] *= settings.weight_decay
    if settings.optimizer == "muon":
        return Muon(groups)
    # One kernel for all weights, where there is one; on CPUs the default stays.
    return torch.optim.AdamW(groups, fused=device.type == "cuda" or None)
