"""Figures about artifacts, and about what a refiner does to them and to everything else."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.adapter_losses import gram_error
from singer.artifacts import clean_mask, patch_norms
from singer.curvature import readers_of
from singer.fit_context import FitContext

Clean = Callable[[Tensor], Tensor]
_BATCH = 32
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)


def norm_quantiles(norms: Tensor) -> dict[str, float]:
    """Return quantiles of patch norms of any shape: {"1 %": ..., "100 %": ...}."""
    ordered = norms.flatten().sort().values
    return {f"{100 * q:g} %": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}


def artifact_map(context: FitContext) -> Tensor:
    """Return the share (%) of the images with an artifact at each patch, (rows, columns). Needs a whole grid."""
    assert context.grid is not None
    share: Tensor = 100 * (~context.clean).float().mean(0).unflatten(0, context.grid)
    return share


def artifact_direction(context: FitContext) -> dict[str, float]:
    """Measure what the artifact tokens have in common, apart from their length; {} if there are fewer than two.

    cosine: mean over all pairs; rank: exp of the entropy of the spectrum of their unit vectors; first_share (%): share
    of the first singular direction; channel and channel_share (%): the channel with the largest part of that direction.
    """
    artifacts = F.normalize(context.patches[~context.clean].double(), dim=1)
    count = len(artifacts)
    if count < 2:
        return {}
    pairs = (artifacts.sum(0).square().sum() - count) / (count * (count - 1))
    values, vectors = torch.linalg.eigh(artifacts.T @ artifacts / count)
    spectrum = (values.clamp_min(0) / values.clamp_min(0).sum()).clamp_min(1e-30)
    first = vectors[:, -1].square()
    return {
        "cosine": float(pairs),
        "rank": float((-(spectrum * spectrum.log()).sum()).exp()),
        "first_share": 100 * float(spectrum[-1]),
        "channel": int(first.argmax()),
        "channel_share": 100 * float(first.max()),
    }


def loss_share(context: FitContext, clean: Clean | None = None) -> dict[str, float]:
    """Return the share (%) of artifact tokens in L_KD (mse) and its gradient, for a student that knows the clean mean.

    This is the state of a student after its first steps; a token's gradient grows with its error (the paper's bias
    analysis). clean: a refiner; the tokens counted are still those that are artifacts in the original.
    """
    artifact = ~context.clean
    tokens = context.tokens if clean is None else clean(context.tokens)
    patches = tokens[:, context.prefix :]
    errors = (patches - patches[~artifact].mean(0)).norm(dim=-1)
    return {
        "tokens": 100 * float(artifact.float().mean()),
        "loss": 100 * float(errors[artifact].square().sum() / errors.square().sum()),
        "gradient": 100 * float(errors[artifact].sum() / errors.sum()),
    }


@torch.no_grad()
def reader_drift(context: FitContext, clean: Clean) -> dict[str, dict[str, float]]:
    """Measure how much a refiner changes the readers' outputs.

    Returns {reader: {"clean_l2", "clean_cosine", "artifact_l2", "artifact_cosine"}}. l2 (%): L2 norm of the change over
    that of the original output. Clean patch tokens and artifacts are measured apart. A block without a norm before its
    first branch has no reader next-norm.
    """
    found: dict[str, dict[str, float]] = {}
    kinds = {"clean": context.clean, "artifact": ~context.clean}
    for name, read in readers_of(context.suffix, context.block).items():
        sums = dict.fromkeys(kinds, (0.0, 0.0, 0.0, 0))
        for start in range(0, len(context.tokens), _BATCH):
            x = context.tokens[start : start + _BATCH]
            before, after = (read(context.suffix, t, context.block)[:, context.prefix :] for t in (x, clean(x)))
            for kind, mask in kinds.items():
                a, b = before[mask[start : start + _BATCH]], after[mask[start : start + _BATCH]]
                change, size, cosine, count = sums[kind]
                sums[kind] = (
                    change + float((b - a).square().sum()),
                    size + float(a.square().sum()),
                    cosine + float(F.cosine_similarity(a, b, dim=-1).sum()),
                    count + len(a),
                )
        figures: dict[str, float] = {}
        for kind, (change, size, cosine, count) in sums.items():
            if count:
                figures |= {f"{kind}_l2": 100 * (change / size) ** 0.5, f"{kind}_cosine": cosine / count}
        found[name] = figures
    return found


@torch.no_grad()
def splice(context: FitContext, clean: Clean) -> dict[str, float]:
    """Compare the teacher's predictions from refined features with those from the block's own output.

    top1 (%): share of images that keep their first class; kl: mean Kullback-Leibler divergence of the refined from the
    original prediction, nats; gram: mean squared error of the cosine Gram of clean patches. A teacher without a head
    has only gram.
    """
    same, divergence, gram = 0, 0.0, 0.0
    classes = getattr(context.suffix.model, "num_classes", 0) > 0
    for x in context.tokens.split(_BATCH):
        refined = clean(x)
        kept = clean_mask(patch_norms(x, context.prefix), context.scale.threshold)
        gram += float(gram_error(refined[:, context.prefix :], x[:, context.prefix :], kept)) * len(x)
        if classes:
            before, after = (context.suffix.logits(t, context.block).log_softmax(-1) for t in (x, refined))
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            divergence += float(F.kl_div(after, before, log_target=True, reduction="sum"))
    count = len(context.tokens)
    figures = {"top1": 100 * same / count, "kl": divergence / count} if classes else {}
    return figures | {"gram": gram / count}
