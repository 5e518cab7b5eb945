"""What stage 3 trains: a student, and its projectors and objective for each teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config import DistillConfig
from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch
from pipeline.training.distilling.teacher_branch import BatchTargets, TeacherBranch, errors, explained_variance
from pipeline.training.learner import TOKENS, Learner
from pipeline.training.schedule import token_share
from singer.backbones import block_outputs, freeze_unused
from singer.errors import UserError
from singer.objectives import Tokens
from singer.patch_dropout import PatchDropout, install
from singer.patch_masks import PatchMasks
from singer.tokens import global_tokens

# The parameters of an attention that make its queries, keys and values.
_MAKE_ATTENTION = ("qkv.", "q_bias", "k_bias", "v_bias", "q_norm.", "k_norm.")


@dataclass(frozen=True)
class BranchLosses:
    """The losses of a batch for one teacher.

    records: {part of its objective: losses (B,)}; adapters: as in BatchTargets; errors: {teacher block: squares} of its
    normalised targets, in eval mode alone.
    """

    records: dict[str, Tensor]
    adapters: Mapping[str, Tensor]
    errors: Mapping[int, Tensor]


class Distiller(Learner):
    """The module with all that is trained: a student, and what it has for each teacher. It computes the losses.

    drop: the probability with which a teacher is left out for an image, unless its loss is the largest there (UNIC,
    arXiv 2408.05088).
    """

    def __init__(self, student: Backbone, branches: Sequence[TeacherBranch], drop: float = 0.0) -> None:
        super().__init__(student, branches[0].targets.device)
        self.branches, self.drop = list(branches), drop
        self._prefix, self._has_cls = student.prefix, student.has_cls
        # A single teacher has no name in parameters and losses.
        trained = {branch.name: nn.ModuleDict(branch.trained) for branch in branches}
        named = trained if len(branches) > 1 else branches[0].trained
        for name, module in named.items():
            self.add_module(name, module)
        self.blocks = sorted({block for branch in branches for block in branch.blocks})
        freeze_unused(self.student, self.blocks[-1], student.image_size)
        for branch in branches:
            for block in branch.attention.values():
                block.norm1.requires_grad_(True)
                for name, weight in block.attn.named_parameters():
                    if name.startswith(_MAKE_ATTENTION):
                        weight.requires_grad_(True)
        # Their attention is called by itself.
        self.called_apart = [block for branch in branches for block in branch.attention.values()]
        self.dropout: PatchDropout | None = None
        self.share = 1.0  # of its patches that the student sees in the first steps
        # Return the share of its patches that the student sees, of a step and the steps of an epoch.
        self._schedule: Callable[[int, int], float] | None = None
        self.masks: PatchMasks | None = None
        self.mask_weight = 0.0

    def begin_step(self, batch: Batch, per_epoch: int) -> Batch:
        """Set the share of the patches that the student sees in this step."""
        if self.dropout is not None and self._schedule is not None:
            self.dropout.share = self._schedule(batch.step, per_epoch)
        return batch

    def figures(self, sums: Mapping[str, Tensor]) -> dict[str, object]:
        """Return {explained_variance: {teacher block: share of the variance of its targets}}."""
        return {"explained_variance": {block: explained_variance(x) for block, x in sums.items()}}

    def drop_patches(self, share: float, settings: DistillConfig) -> None:
        """Let the student see a share of its patches, and all of them in the last steps (distill.whole_share).

        Raises UserError if this is not possible.
        """
        for branch in self.branches:
            branch.targets.check_whole("token_share=1", "the student cannot leave out others")
        self.share = share
        self.dropout, self._schedule = install(self.student), partial(token_share, share, settings)

    def mask_patches(self, share: float, weight: float) -> None:
        """Let the student see each batch a second time, with a share of its patches masked, and learn what is there.

        weight: of these losses (distill.mask_weight). Raises UserError if this is not possible.
        """
        for branch in self.branches:
            branch.check_tokenwise("mask_share=0", "the student would have to learn others, too")
        device = next(self.student.parameters()).device
        self.masks, self.mask_weight = PatchMasks(self.student, share).to(device), weight

    def decoded(self, batch: Batch) -> Batch:
        """Return a batch with the features of each teacher decoded, if they are in their stored form."""
        pairs = zip(self.branches, batch.features, strict=True)
        return replace(batch, features=[branch.targets.decode(features) for branch, features in pairs])

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return named scalar losses, whose sum is minimised, and, in eval mode, {teacher block: squares}, and TOKENS.

        These are CLS of the deepest block that is compared, or without CLS the mean of its patches.
        """
        outputs = self.outputs(batch)
        found = self.branch_losses(batch, outputs)
        several = len(found) > 1
        drops = self.drop and self.training and several
        shares = teacher_shares([own.records for own in found], self.drop) if drops else None
        losses: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for n, (branch, own) in enumerate(zip(self.branches, found, strict=True)):
            prefix = f"{branch.name}." if several else ""
            weights = batch.weights if shares is None else batch.weights * shares[n]
            summed = {name: (loss * weights).sum() * branch.weight for name, loss in own.records.items()}
            losses |= {f"{prefix}{name}": loss for name, loss in (summed | dict(own.adapters)).items()}
            sums |= {f"{prefix}{block}": x for block, x in own.errors.items()}
        if not self.training:
            sums[TOKENS] = global_tokens(outputs[self.blocks[-1]], self._prefix, self._has_cls)
        return losses, sums

    def outputs(self, batch: Batch) -> dict[int, Tensor]:
        """Show the student the images of a batch; return {student block: its output (B, N, d)}, of those compared."""
        return block_outputs(self.student, self.images(batch), self.blocks)

    def branch_losses(self, batch: Batch, outputs: Mapping[int, Tensor]) -> list[BranchLosses]:
        """Return the losses for each teacher. outputs: those of the student."""
        targets = [branch.targets_of(x, batch) for branch, x in zip(self.branches, batch.features, strict=True)]
        pairs = self._pairs(outputs, targets, batch)
        records = self._compared(pairs, batch)
        if self.masks is not None and self.training:
            self.masks.active = True
            again = self._compared(self._pairs(self.outputs(batch), targets, batch, self.masks), batch)
            self.masks.active = False
            # These losses are means over all tokens, and only the masked ones have any.
            weight = self.mask_weight * self.masks.rarity
            masked = [{f"masked.{name}": weight * loss for name, loss in parts.items()} for parts in again]
            records = [seen | unseen for seen, unseen in zip(records, masked, strict=True)]
        return [
            BranchLosses(of_records, own.adapter_losses, {} if self.training else errors(*pair))
            for of_records, own, pair in zip(records, targets, pairs, strict=True)
        ]

    def _pairs(
        self,
        outputs: Mapping[int, Tensor],
        targets: Sequence[BatchTargets],
        batch: Batch,
        masks: PatchMasks | None = None,
    ) -> list[tuple[Tokens, Tokens]]:
        """Return the student's tokens and the targets, of masked patches if there are masks."""
        kept = self.dropout.kept if self.dropout is not None else None
        masked = masks.masked if masks is not None else None
        return [
            branch.compare(outputs, own, batch, kept, masked)
            for branch, own in zip(self.branches, targets, strict=True)
        ]

    def _compared(self, pairs: Sequence[tuple[Tokens, Tokens]], batch: Batch) -> list[dict[str, Tensor]]:
        """Return what each teacher's objective says of its pair of tokens, {part: losses (B,)}."""
        # Half precision loses small differences of large products, such as those in Gram matrices.
        with torch.autocast(batch.weights.device.type, enabled=False):
            means = self.mean_soft_targets([targets for _, targets in pairs]) if len(pairs) > 1 else {}
            return [
                branch.objective(student, targets, batch.labels, means)
                for branch, (student, targets) in zip(self.branches, pairs, strict=True)
            ]

    def mean_soft_targets(self, targets: Sequence[Tokens]) -> dict[str, Tensor]:
        """Return {objective: the mean of the teachers' soft targets, by their weights}. targets: those of each teacher.

        Raises UserError if the teachers' heads have different classes.
        """
        soft_targets = [branch.objective.soft_targets(own) for branch, own in zip(self.branches, targets, strict=True)]
        means = {}
        for name in dict.fromkeys(name for found in soft_targets for name in found):
            of_name = [
                (b.weight, found[name]) for b, found in zip(self.branches, soft_targets, strict=True) if name in found
            ]
            if len({x.shape for _, x in of_name}) > 1:
                counts = " and ".join(str(x.shape[-1]) for _, x in of_name)
                raise UserError(
                    f"distill.objective {name}: the teachers' heads have {counts} classes; "
                    "give teachers whose heads have the same classes"
                )
            means[name] = sum(w * x for w, x in of_name) / sum(w for w, _ in of_name)
        return means  # type: ignore[return-value]


@torch.no_grad()
def teacher_shares(found: Sequence[Mapping[str, Tensor]], drop: float) -> Tensor:
    """Draw which teachers count for which image, (teachers, B); all together count as much as without dropping.

    found: {part: losses (B,)} of each teacher. The teacher with the largest loss always counts.
    """
    losses = torch.stack([torch.stack(list(parts.values())).sum(0) for parts in found])
    kept = (torch.rand_like(losses) >= drop) | (losses == losses.amax(0))
    return kept * (kept.numel() / kept.sum())
