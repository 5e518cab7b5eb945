"""What changes from step to step: the learning rate, and the share of the patches that a student sees."""

import math

from pipeline.config import DistillConfig, TrainingConfig


def peak_rate(settings: TrainingConfig, width: int) -> float:
    """Return the key lr, or its rule for a student `width` channels wide.

    At 96 channels 4e-3 was better than 2e-3, and that better than 1e-3 (AdamW), and 8e-3 was no better (Muon; see
    docs/results.md). For wider students, the rate of Adam falls as 1 / width (Tensor Programs V, arXiv:2203.03466),
    which gives the usual ones of ViTs: 2e-3 for ViT-Ti, 1e-3 for ViT-S and 5e-4 for ViT-B. The largest singular value
    of an update whose numbers have a given size grows as the width if its rows point one way, as Adam's may, and as the
    root of the width if they are orthogonal, as Muon's are: so the rate of Muon falls as the root.
    """
    power = 0.5 if settings.optimizer == "muon" else 1.0
    return 4e-3 * min(1.0, (96 / width) ** power) if settings.lr == "auto" else settings.lr


def layer_decay(settings: TrainingConfig, blocks: int, of_the_teacher: bool) -> float:
    """Return the key layer_decay, or its rule for a student of so many blocks.

    of_the_teacher: whether it starts as some of the teacher's blocks, with all their channels. Four such blocks were
    better with 0.7, and four with half of the channels no better (docs/results.md, "Equal time"). Students with more
    blocks have the same rates at the first and at the last block.
    """
    if settings.layer_decay != "auto":
        return settings.layer_decay
    return 0.7 ** min(1.0, 4 / blocks) if of_the_teacher else 1.0


def learning_rate(settings: TrainingConfig, step: int, per_epoch: int, peak: float) -> float:
    """Return the learning rate: a linear warm-up over warmup_epochs, then half a cosine down to final_lr · peak."""
    warm = settings.warmup_epochs * per_epoch
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    done = (step - warm) / max(1.0, settings.epochs * per_epoch - 1 - warm)
    return peak * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def token_share(share: float, settings: DistillConfig, step: int, per_epoch: int) -> float:
    """Return the share of its patches that a student sees: `share`, and all in the last steps."""
    last = settings.epochs * per_epoch * (1 - settings.whole_share)
    return share if step < last else 1.0
