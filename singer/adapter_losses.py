"""The losses that fit adapters (SiNGER, arXiv 2509.20986), in this project's, the paper's and the authors' forms.

L_outlier has forms (norms of refined patches (B, patches), scale of the block, γ) -> scalar; L_info has forms of a
RefinementBatch and a block. A new form is a function and a line in the registry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from singer.artifacts import BlockScale, clean_mask, expected_patches, patch_norms
from singer.errors import UserError
from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class RefinementBatch:
    """Features of some records before and after refining, {block: (B, N, d)}, and the teacher's suffix.

    suffix: None if the teacher has none; grids: {block: (rows, columns) of its patches, None if only some are stored},
    which L_expect needs.
    """

    original: Mapping[int, Tensor]
    refined: Mapping[int, Tensor]
    suffix: TeacherSuffix | None
    scales: Mapping[int, BlockScale]
    prefix: int
    grids: Mapping[int, tuple[int, int] | None] = field(default_factory=dict)

    @property
    def known_suffix(self) -> TeacherSuffix:
        """Return the suffix, which must be there."""
        assert self.suffix is not None
        return self.suffix

    def clean(self, block: int) -> Tensor:
        """Return True (B, patches) where the ORIGINAL token is not an artifact."""
        return clean_mask(patch_norms(self.original[block], self.prefix), self.scales[block].threshold)

    def next_block_outputs(self, block: int) -> tuple[Tensor, Tensor]:
        """Return outputs (B, N, d) of the next block for refined and original tokens; for the last, the tokens."""
        with torch.no_grad():
            original = self.known_suffix.next_output(self.original[block], block)
        return self.known_suffix.next_output(self.refined[block], block), original


OutlierForm = Callable[[Tensor, BlockScale, float], Tensor]
InfoForm = Callable[[RefinementBatch, int], Tensor]


def robust_outlier(norms: Tensor, scale: BlockScale, quantile: float) -> Tensor:
    """Compute the mean squared excess over a fixed threshold, in units of the median norm; clean images add nothing."""
    return ((norms - scale.threshold).clamp_min(0) / max(scale.median, 1e-12)).square().mean()


def paper_outlier(norms: Tensor, scale: BlockScale, quantile: float) -> Tensor:
    """Compute the mean excess over the γ-quantile of the image's refined norms (un-squared, as in the paper)."""
    excess, count = _excess(norms, quantile)
    return excess.sum() / count


def official_outlier(norms: Tensor, scale: BlockScale, quantile: float) -> Tensor:
    """Compute the mean SQUARED excess over the image's γ-quantile, pooled over the batch (the authors' code)."""
    excess, count = _excess(norms, quantile)
    return excess.square().sum() / count


def _excess(norms: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return by how much norms (B, n) exceed their row's quantile, which is detached, and how many do (at least 1)."""
    limit = torch.quantile(norms.detach(), quantile, dim=1, keepdim=True)
    return F.relu(norms - limit), (norms > limit).sum().clamp_min(1)


def cosine_gram(tokens: Tensor) -> Tensor:
    """Compute the patch-to-patch cosine similarities (B, n, n) of tokens (B, n, d)."""
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.transpose(1, 2)


def gram_error(refined: Tensor, original: Tensor, clean: Tensor) -> Tensor:
    """Compute the mean squared difference of cosine Grams of tokens (B, n, d), over pairs of tokens in clean (B, n)."""
    pairs = (clean.unsqueeze(1) & clean.unsqueeze(2)).to(refined.dtype)
    error = (cosine_gram(refined) - cosine_gram(original)).square() * pairs
    return error.sum() / pairs.sum().clamp_min(1)


def clean_info(batch: RefinementBatch, block: int) -> Tensor:
    """Compare cosine Grams of clean tokens after the next block; the similarities of artifacts are meant to change."""
    refined, original = batch.next_block_outputs(block)
    return gram_error(refined[:, batch.prefix :], original[:, batch.prefix :], batch.clean(block))


def paper_info(batch: RefinementBatch, block: int) -> Tensor:
    """Compare cosine Grams of all patches after the next block; for the last block, after that block (the paper)."""
    refined, original = (x[:, batch.prefix :] for x in batch.next_block_outputs(block))
    return F.mse_loss(cosine_gram(refined), cosine_gram(original))


def official_info(batch: RefinementBatch, block: int) -> Tensor:
    """Compute the MSE of the next block's raw outputs over all tokens (the authors' code).

    For the last block, compare the cosine Gram of its refined patches with that of the last intermediate block's
    refined patches. Raises UserError if there is no intermediate block.
    """
    if not batch.known_suffix.is_last(block):
        return F.mse_loss(*batch.next_block_outputs(block))
    others = [b for b in batch.refined if b != block]
    if not others:
        raise UserError("refine.info_form official needs an intermediate block besides the last; cache another block")
    last, before = (batch.refined[b][:, batch.prefix :] for b in (block, max(others)))
    return F.mse_loss(cosine_gram(last), cosine_gram(before))


OUTLIER_FORMS: dict[str, OutlierForm] = {
    "robust": robust_outlier,
    "paper": paper_outlier,
    "official": official_outlier,
}
INFO_FORMS: dict[str, InfoForm] = {"clean": clean_info, "paper": paper_info, "official": official_info}
# In these forms a block's loss depends on another block's adapter.
COUPLED = {"official"}


def keep_loss(refined: Tensor, original: Tensor, clean: Tensor) -> Tensor:
    """Compute the share of the variance of clean tokens (B, n, d), clean (B, n), that refinement changes; 0 is none.

    Not in the paper: the Gram of L_info does not change with rotations and with the length of tokens, so that
    adapters may drift far while it stays small. A shift common to all tokens costs nothing: it says nothing about an
    image.
    """
    weight = clean.unsqueeze(-1).to(original.dtype)
    count = weight.sum().clamp_min(1)

    def variation(x: Tensor) -> Tensor:
        """Return the summed squared distance of clean tokens from their mean."""
        return ((x - (x * weight).sum((0, 1)) / count) * weight).square().sum()

    return variation(refined - original) / variation(original).clamp_min(1e-12)


def expect_loss(batch: RefinementBatch, block: int) -> Tensor:
    """Compute how far refined artifacts are from the mean of their clean neighbours; 1 is as far as clean tokens are.

    Not in the paper, whose L_outlier sees norms alone: an artifact that is only made shorter keeps its direction.
    """
    original, refined = (x[block][:, batch.prefix :] for x in (batch.original, batch.refined))
    clean = batch.clean(block)
    expected = expected_patches(original, clean, batch.scales[block].threshold, batch.grids[block])

    def distance(tokens: Tensor, which: Tensor) -> Tensor:
        """Return the mean squared distance of some tokens from what is expected at their places."""
        return ((tokens - expected).square().sum(-1) * which).sum() / which.sum().clamp_min(1)

    unit = distance(original, clean)
    # Without a clean token there is no unit: divided by almost nothing, one such batch would outweigh all others.
    return torch.where(unit > 0, distance(refined, ~clean) / unit.clamp_min(1e-12), 0.0)


@dataclass(frozen=True)
class AdapterLosses:
    """What adapters minimise. parts: {name: {block: loss}}, not weighted; weights: {name: weight}."""

    parts: Mapping[str, Mapping[int, Tensor]]
    weights: Mapping[str, float]

    @property
    def total(self) -> Tensor:
        """Return the weighted sum of the losses of a block, as a mean over the blocks."""
        terms = [self.weights[name] * loss for name, by_block in self.parts.items() for loss in by_block.values()]
        return torch.stack(terms).sum() / len(self.parts["outlier"])

    @property
    def weighted(self) -> dict[str, Tensor]:
        """Return {name: its weighted loss, as a mean over the blocks}; they add up to the total."""
        means = {name: torch.stack(list(by_block.values())).mean() for name, by_block in self.parts.items()}
        return {name: weight * means[name] for name, weight in self.weights.items() if name in means}


def adapter_losses(
    batch: RefinementBatch,
    blocks: Sequence[int],
    outlier_form: str,
    info_form: str,
    quantile: float,
    weights: Mapping[str, float],
) -> AdapterLosses:
    """Compute the losses of some blocks.

    weights: {name: weight} of outlier, info and, if they are wanted, keep and expect. Without a suffix, there is no
    info.
    """
    prefix = batch.prefix
    losses = {
        "outlier": {
            b: OUTLIER_FORMS[outlier_form](patch_norms(batch.refined[b], prefix), batch.scales[b], quantile)
            for b in blocks
        },
    }
    if batch.suffix is not None:
        losses["info"] = {b: INFO_FORMS[info_form](batch, b) for b in blocks}
    if "expect" in weights:
        losses["expect"] = {b: expect_loss(batch, b) for b in blocks}
    if "keep" in weights:
        losses["keep"] = {
            b: keep_loss(batch.refined[b][:, prefix:], batch.original[b][:, prefix:], batch.clean(b)) for b in blocks
        }
    return AdapterLosses(losses, weights)
