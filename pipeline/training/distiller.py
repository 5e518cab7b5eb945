"""Build what stage 3 trains: a student, and its projectors and objective for each teacher.

The targets are made from stored features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cache.reader import Cache, Encoded
from pipeline.config import RefineConfig
from pipeline.data.sampler import part_size
from pipeline.teachers.backbone import Backbone
from pipeline.training.refiner_fit import RefinerFit
from singer.artifacts import BlockScale
from singer.backbones import block_outputs, freeze_unused
from singer.cleaners import Adapter
from singer.losses import RefinementBatch, adapter_losses
from singer.matching import resize_tokens, take_patches
from singer.objectives import OBJECTIVES, Mixture, Objective, ObjectiveContext, Tokens
from singer.projectors import PROJECTORS, ProjectorSpec
from singer.refiner import Refiner
from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's part of a batch on the device.

    features: {block: (B, N, d)}, as the teacher computed them; positions: (B, k), those of sampled patches.
    """

    features: dict[int, Tensor]
    positions: Tensor | None = None

    def rows(self, rows: slice) -> "TeacherFeatures":
        """Return the features of some records of the batch."""
        positions = self.positions[rows] if self.positions is not None else None
        return TeacherFeatures({b: x[rows] for b, x in self.features.items()}, positions)


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    images: (B, 3, H, W); shown: the features of each teacher; weights: (B,), the weight of each record in the mean;
    labels: (B,), negative where there is none.
    """

    images: Tensor
    shown: Sequence[TeacherFeatures]
    weights: Tensor
    labels: Tensor

    def split(self, parts: int) -> Iterator["Batch"]:
        """Split the batch into `parts` parts, or fewer if there are not enough records."""
        size = part_size(len(self.weights), parts)
        for start in range(0, len(self.weights), size):
            rows = slice(start, start + size)
            shown = [s.rows(rows) for s in self.shown]
            yield Batch(self.images[rows], shown, self.weights[rows], self.labels[rows])


@dataclass(frozen=True)
class JointTraining:
    """What the losses of adapters need when they are trained with the student, as in the paper.

    This is not a module, because all of it is frozen. prefix: the number of the teacher's prefix tokens.
    """

    suffix: TeacherSuffix
    scales: dict[int, BlockScale]
    settings: RefineConfig
    prefix: int

    @property
    def weights(self) -> dict[str, float]:
        """Return {name of a loss: its weight}."""
        s = self.settings
        return {"outlier": s.outlier_weight, "info": s.info_weight} | ({"keep": s.keep_weight} if s.keep_weight else {})

    def losses(self, original: Mapping[int, Tensor], refined: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return the weighted L_outlier and L_info (and L_keep), each as a mean over the blocks.

        original, refined: {block: (B, N, d)}.
        """
        s = self.settings
        found = adapter_losses(
            RefinementBatch(original, refined, self.suffix, self.scales, self.prefix),
            list(refined), s.outlier_form, s.info_form, s.quantile, s.keep_weight > 0,
        )  # fmt: skip
        return {name: weight * torch.stack(list(found[name].values())).mean() for name, weight in self.weights.items()}


class TeacherBranch:
    """What a student has for one teacher: projectors, an objective and, in joint training, adapters.

    There is a projector to the teacher's width at every matched block; the adapters refine the targets. matching:
    {teacher block: student block}; objectives: {name: weight}; weight: the weight of their sum; name: the teacher's
    name among several teachers.
    """

    def __init__(
        self,
        student: Backbone,
        matching: dict[int, int],
        targets: "Targets",
        objectives: Mapping[str, float],
        projector: str = "linear",
        adapters: Refiner | None = None,
        joint: JointTraining | None = None,
        weight: float = 1.0,
        name: str = "",
    ) -> None:
        self.name, self.weight = name, weight
        self.targets, self.joint, self.adapters = targets, joint, adapters
        self.prefix, self.layout = student.prefix, student.layout
        project = PROJECTORS[projector]
        context = targets.objective_context(tuple(matching), [OBJECTIVES[o] for o in objectives])
        self.objective = Mixture({o: OBJECTIVES[o](context) for o in objectives}, objectives)

        def projectors(blocks: Sequence[int]) -> nn.ModuleDict:
            """Build projectors for the compared blocks only: a projector without a gradient would stop DDP."""
            made = {}
            for t in blocks:
                spec = ProjectorSpec(*self.layout[matching[t]], context.width, targets.grid, context.prefix)
                made[str(t)] = project(spec)
            return nn.ModuleDict(made)

        self.normalised, self.cleaned = (self.objective.reads(in_units) for in_units in (False, True))
        self.projectors, self.unit_projectors = projectors(self.normalised), projectors(self.cleaned)
        self.matching = {t: matching[t] for t in sorted({*self.normalised, *self.cleaned})}
        # {teacher block: the grid of the projected tokens}.
        self.grids = {t: targets.grid if project.lifts else self.layout[b][1] for t, b in self.matching.items()}

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Return the modules that are trained for this teacher alone, by name."""
        modules = {"projectors": self.projectors, "unit_projectors": self.unit_projectors, "adapters": self.adapters}
        return {"objective": self.objective, **{name: module for name, module in modules.items() if module}}

    def tokens(self, outputs: Mapping[int, Tensor], positions: Tensor | None) -> Tokens:
        """Project the student's tokens to the teacher's width, and resize or select them to match the targets.

        outputs: {student block: (B, N, d)}; positions: (B, k), those of sampled patches.
        """
        kept = {b: select_tokens(outputs[b], self.prefix, self.targets.keep_cls) for b in self.matching.values()}

        def projected(projectors: nn.ModuleDict) -> dict[int, Tensor]:
            tokens = {int(t): project(kept[self.matching[int(t)]]).float() for t, project in projectors.items()}
            return self.targets.meet(tokens, self.grids, positions)

        return Tokens(projected(self.projectors), projected(self.unit_projectors))

    def losses(
        self, outputs: Mapping[int, Tensor], shown: TeacherFeatures, weights: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return named scalar losses of the student's outputs.

        outputs: {student block: (B, N, d)}; weights, labels: those of a Batch.
        """
        targets, device = self.targets, weights.device.type
        losses: dict[str, Tensor] = {}
        if self.joint is None:
            wanted = targets.refine(shown.features)
        else:
            assert self.adapters is not None
            with torch.autocast(device, enabled=False):
                refined = self.adapters(shown.features)
                losses = self._joint_losses(shown.features, refined, weights)
            wanted = Tokens(refined, refined)
        tokens = self.tokens(outputs, shown.positions)
        wanted = Tokens(
            targets.arrange({b: wanted.normalised[b] for b in self.normalised}, shown.positions),
            targets.arrange({b: wanted.cleaned[b] for b in self.cleaned}, shown.positions),
        )
        # Half precision loses small differences of large products, such as those in Gram matrices.
        with torch.autocast(device, enabled=False):
            found = self.objective(tokens, wanted, labels)
        return {name: (loss * weights).sum() * self.weight for name, loss in found.items()} | losses

    def _joint_losses(
        self, features: Mapping[int, Tensor], refined: Mapping[int, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the adapters' losses in proportion to the records of this part of the batch, so that parts add up."""
        assert self.joint is not None
        real = weights > 0  # the last batch of an epoch may be padded with other records
        if not real.any():
            zero = 0.0 * torch.stack([x.sum() for x in refined.values()]).sum()
            return dict.fromkeys(self.joint.weights, zero)
        losses = self.joint.losses({b: x[real] for b, x in features.items()}, {b: x[real] for b, x in refined.items()})
        return {name: loss * weights.sum() for name, loss in losses.items()}


class Distiller(nn.Module):
    """The module with all that is trained: a student, and what it has for each teacher. It computes the losses."""

    def __init__(self, student: Backbone, heads: Sequence[TeacherBranch]) -> None:
        super().__init__()
        self.student = student.model
        self.heads = list(heads)
        # A single teacher has no name in parameters and losses.
        named = {head.name: nn.ModuleDict(head.trained) for head in heads} if len(heads) > 1 else heads[0].trained
        for name, module in named.items():
            self.add_module(name, module)
        self.blocks = sorted({block for head in heads for block in head.matching.values()})
        freeze_unused(self.student, self.blocks[-1], student.image_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses; their sum is minimised."""
        outputs = block_outputs(self.student, batch.images, self.blocks)
        losses: dict[str, Tensor] = {}
        for head, shown in zip(self.heads, batch.shown, strict=True):
            found = head.losses(outputs, shown, batch.weights, batch.labels)
            prefix = f"{head.name}." if len(self.heads) > 1 else ""
            losses |= {f"{prefix}{name}": loss for name, loss in found.items()}
        return losses


def select_tokens(tokens: Tensor, prefix: int, keep_cls: bool) -> Tensor:
    """Return CLS (if kept) and the patches of tokens (B, N, d); registers are never compared between models."""
    patches = tokens[:, prefix:]
    return torch.cat([tokens[:, :1], patches], dim=1) if keep_cls else patches


class Targets:
    """Turn stored features into what the student must match.

    The targets are on the student's token grid. They are on the teacher's grid if the student has several grids, or if
    a projector lifts the student's tokens to the teacher's grid (`lifted`).
    """

    def __init__(
        self, cache: Cache, refiner: Refiner | None, student: Backbone, device: torch.device, lifted: bool = False
    ) -> None:
        self.cache, self.device = cache, device
        self.refiner = refiner.to(device) if refiner is not None else None
        self.keep_cls = cache.manifest.teacher.class_token and student.has_cls
        self.grid = student.grid if student.is_vit and not lifted else cache.manifest.teacher.grid

    @property
    def meeting_grid(self) -> tuple[int, int] | None:
        """Return the grid on which tokens are compared; None if the cache holds only some of the patches."""
        return None if self.cache.manifest.sampled else self.grid

    def features(self, encoded: Encoded) -> dict[int, Tensor]:
        """Decode the teacher's features, {block: (B, N, d)}, on the device."""
        return self.cache.decode(encoded, self.device)

    def objective_context(self, blocks: tuple[int, ...], objectives: Sequence[type[Objective]]) -> ObjectiveContext:
        """Return what these objectives may know; the teacher's suffix is only loaded if one of them needs it."""
        teacher, labels = self.cache.manifest.teacher, self.cache.index.images.labels
        classes = int(labels.max()) + 1 if len(labels) and int(labels.max()) >= 0 else None
        return ObjectiveContext(
            blocks,
            teacher.width,
            int(self.keep_cls),
            self.meeting_grid,
            self.cache.suffix().to(self.device) if any(o.in_teacher_units for o in objectives) else None,
            teacher.prefix_tokens,
            classes,
        )

    @torch.no_grad()
    def refine(self, features: dict[int, Tensor]) -> Tokens:
        """Clean and normalise features by the frozen refiner, if there is one.

        This is done in full precision because refinement takes small differences of large values.
        """
        if self.refiner is None:
            return Tokens(features, features)
        with torch.autocast(self.device.type, enabled=False):
            cleaned = {b: self.refiner.clean(x, b) for b, x in features.items()}
            return Tokens({b: self.refiner.normaliser(b)(x) for b, x in cleaned.items()}, cleaned)

    def arrange(self, features: Mapping[int, Tensor], positions: Tensor | None) -> dict[int, Tensor]:
        """Select the tokens that the student has, too, and resize them to the common grid unless they were sampled."""
        teacher = self.cache.manifest.teacher
        targets = {b: select_tokens(x, teacher.prefix_tokens, self.keep_cls) for b, x in features.items()}
        if positions is not None:
            return targets
        return {b: resize_tokens(x, int(self.keep_cls), teacher.grid, self.grid) for b, x in targets.items()}

    def __call__(self, encoded: Encoded) -> dict[int, Tensor]:
        """Return normalised targets {block: (B, N, d)} of stored records."""
        return self.arrange(self.refine(self.features(encoded)).normalised, encoded.positions)

    def meet(
        self, tokens: dict[int, Tensor], grids: Mapping[int, tuple[int, int]], positions: Tensor | None
    ) -> dict[int, Tensor]:
        """Bring student tokens to the places of the targets, which are the sampled positions if patches were sampled.

        tokens: {teacher block: (B, N, d)}; grids: {teacher block: the grid of these tokens}; positions: (B, k), those
        of sampled patches.
        """
        prefix = int(self.keep_cls)
        if positions is None:
            return {b: resize_tokens(x, prefix, grids[b], self.grid) for b, x in tokens.items()}
        grid = self.cache.manifest.teacher.grid
        return {b: take_patches(resize_tokens(x, prefix, grids[b], grid), prefix, positions) for b, x in tokens.items()}


def new_joint(cache: Cache, settings: RefineConfig, device: torch.device) -> tuple[JointTraining, Refiner]:
    """Return what the losses of joint training need, and new adapters in their starting subspace."""
    settings = settings.model_copy(update={"cleaner": "adapter", "normaliser": "none"})
    fit = RefinerFit(cache, settings, np.arange(len(cache)), device)
    for block, start in fit.starts.items():
        adapter = fit.refiner.cleaner(block)
        assert isinstance(adapter, Adapter)
        adapter.start(start, settings.start == "doubled")
    return JointTraining(fit.suffix, fit.scales, settings, cache.manifest.teacher.prefix_tokens), fit.refiner
