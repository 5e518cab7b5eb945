"""Patch tokens as pictures: similarity to one of them, and their principal components."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Three components are shown: red, green and blue.
COLOURS = 3


def cosine_to(patches: Tensor, marked: Tensor) -> Tensor:
    """Compute the cosine similarity (n, P) of each image's patches (n, P, d) to its patch of number marked (n,)."""
    own = patches[torch.arange(len(patches)), marked].unsqueeze(1)
    similarity: Tensor = F.cosine_similarity(patches, own, dim=-1)
    return similarity


def principal_scores(patches: Tensor) -> Tensor:
    """Compute the first three principal components of all patches (n, P, d) together, with mean 0 and variance 1.

    Returns (n, P, 3). With fewer channels, or where nothing varies, the missing components are zero. A component's sign
    is such that its largest loading is positive.
    """
    flat = patches.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(flat))
    values, vectors = values.flip(0)[:COLOURS], vectors.flip(1)[:, :COLOURS]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    real = values > 1e-12 * values[:1].clamp_min(1e-30)
    weights = vectors * largest.sign() * torch.where(real, values.clamp_min(1e-30).rsqrt(), 0.0)
    scores = F.pad(centred @ weights, (0, COLOURS - weights.shape[1]))
    shaped: Tensor = scores.float().unflatten(0, patches.shape[:2])
    return shaped


def turn_towards(scores: Tensor, grid: tuple[int, int], target: Tensor, target_grid: tuple[int, int]) -> Tensor:
    """Rotate scores (n, P, c) so that they come nearest to a target (n, Q, c): orthogonal Procrustes.

    Components of two models have no common order and sign; this rotation gives them one, and changes no distances.
    grid, target_grid: (rows, columns) of P and Q.
    """
    maps = scores.transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(maps, size=target_grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    u, _, v = torch.linalg.svd(resized.flatten(0, 1).double().T @ target.flatten(0, 1).double())
    turned: Tensor = scores @ (u @ v).float()
    return turned
