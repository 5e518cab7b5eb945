"""What stage 3 trains: a student, and its projectors and objective for each teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.models.backbone import Backbone
from pipeline.training.batch import Batch, TeacherFeatures
from pipeline.training.joint_training import JointTraining
from pipeline.training.targets import Targets, select_tokens
from singer.backbones import block_outputs, freeze_unused
from singer.errors import UserError
from singer.exits import has_exit
from singer.objectives import OBJECTIVES, Mixture, Tokens
from singer.patch_dropout import PatchDropout, install
from singer.projectors import PROJECTORS, Projector, ProjectorSpec
from singer.refiner import Refiner


class TeacherBranch:
    """What a student has for one teacher: projectors, an objective and, in joint training, adapters.

    A projector brings tokens to the teacher's width; there is one at every matched block. The adapters refine the
    targets. matching: {teacher block: student block}; objectives: {name: weight}; weight: the weight of their sum;
    name: the teacher's name among several teachers; whole: whether the student always sees all patches; projector: a
    name in PROJECTORS.
    """

    def __init__(
        self,
        student: Backbone,
        matching: dict[int, int],
        targets: Targets,
        objectives: Mapping[str, float],
        adapters: Refiner | None = None,
        joint: JointTraining | None = None,
        weight: float = 1.0,
        name: str = "",
        whole: bool = True,
        projector: str = "linear",
    ) -> None:
        self.name, self.weight = name, weight
        self.targets, self.joint, self.adapters = targets, joint, adapters
        self.prefix, self.layout = student.prefix, student.layout
        context = targets.objective_context(tuple(matching), [OBJECTIVES[o] for o in objectives], whole)
        self.objective = Mixture({o: OBJECTIVES[o](context) for o in objectives}, objectives)
        kind = PROJECTORS[projector]

        def projectors(blocks: Sequence[int]) -> nn.ModuleDict:
            """Build projectors for the compared blocks only: a projector without a gradient would stop DDP."""
            return nn.ModuleDict({str(t): kind(self._spec(matching[t], t, kind)) for t in blocks})

        # The blocks whose targets are compared normalised, and those that are compared in the teacher's units.
        self.normalised_blocks = self.objective.reads(in_teacher_units=False)
        self.cleaned_blocks = self.objective.reads(in_teacher_units=True)
        self.projectors, self.unit_projectors = projectors(self.normalised_blocks), projectors(self.cleaned_blocks)
        if has_exit(student.model) and projector == "linear":
            # A linear map after an exit that is as wide as the teacher would undo what the exit is for.
            for t in (t for t in self.normalised_blocks if self._is_exit(matching[t], t)):
                self.projectors[str(t)] = nn.Identity()
        self.matching = {t: matching[t] for t in sorted({*self.normalised_blocks, *self.cleaned_blocks})}
        # {teacher block: the student's blocks that its projectors read}.
        self.read = {t: _reads(kind, b) for t, b in self.matching.items()}
        # Outside of training: {teacher block: squares} of the last batch.
        self.errors: dict[int, Tensor] = {}
        # {teacher block: the grid of the student's tokens}.
        self.grids = {t: self.layout[b][1] for t, b in self.matching.items()}

    def _is_exit(self, block: int, teacher_block: int) -> bool:
        """Return whether a block is the last one, and as wide as the teacher."""
        return block == len(self.layout) - 1 and self.layout[block][0] == self.targets.width(teacher_block)

    def _spec(self, block: int, teacher_block: int, kind: type[Projector]) -> ProjectorSpec:
        """Return the ends of a projector from a block. Raises UserError if it cannot read the blocks before it."""
        layout = [self.layout[b] for b in _reads(kind, block)]
        if len({grid for _, grid in layout}) > 1:
            raise UserError(
                "distill.projector ladder adds up all blocks, and those of this student have different grids; take "
                "another projector, or a student such as vit"
            )
        widths = tuple(width for width, _ in layout)
        return ProjectorSpec(widths, self.targets.width(teacher_block), int(self.targets.keep_cls))

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Return the modules that are trained for this teacher alone, by name."""
        modules = {"projectors": self.projectors, "unit_projectors": self.unit_projectors, "adapters": self.adapters}
        return {"objective": self.objective, **{name: module for name, module in modules.items() if module}}

    def tokens(self, outputs: Mapping[int, Tensor], positions: Tensor | None, kept: Tensor | None = None) -> Tokens:
        """Project the student's tokens to the teacher's width, and resize or select them to match the targets.

        outputs: {student block: (B, N, d)}; positions: (B, k), those of sampled patches; kept: see losses.
        """
        own = {
            b: select_tokens(outputs[b], self.prefix, self.targets.keep_cls)
            for read in self.read.values()
            for b in read
        }

        def projected(projectors: nn.ModuleDict) -> dict[int, Tensor]:
            tokens = {
                int(t): project(*(own[b] for b in self.read[int(t)])).float() for t, project in projectors.items()
            }
            return tokens if kept is not None else self.targets.student_tokens(tokens, self.grids, positions)

        return Tokens(projected(self.projectors), projected(self.unit_projectors))

    def losses(
        self,
        outputs: Mapping[int, Tensor],
        stored: TeacherFeatures,
        weights: Tensor,
        labels: Tensor,
        filling: int = 0,
        kept: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return named scalar losses of the student's outputs.

        outputs: {student block: (B, N, d)}; weights, labels, filling: those of a Batch; kept: (B, k), the only patches
        that the student saw.
        """
        targets, device = self.targets, weights.device.type
        losses: dict[str, Tensor] = {}
        if self.joint is None:
            wanted = targets.refine(stored.features)
        else:
            assert self.adapters is not None
            with torch.autocast(device, enabled=False):
                refined = self.adapters(stored.features)
                losses = self._joint_losses(stored.features, refined, weights, len(weights) - filling)
            wanted = Tokens(refined, refined)
        tokens = self.tokens(outputs, stored.positions, kept)
        wanted = Tokens(
            targets.target_tokens({b: wanted.normalised[b] for b in self.normalised_blocks}, stored.positions, kept),
            targets.target_tokens({b: wanted.cleaned[b] for b in self.cleaned_blocks}, stored.positions, kept),
        )
        if not self.objective.training:
            self.errors = {b: squares(x, tokens.normalised[b]) for b, x in wanted.normalised.items()}
        # Half precision loses small differences of large products, such as those in Gram matrices.
        with torch.autocast(device, enabled=False):
            found = self.objective(tokens, wanted, labels)
        return {name: (loss * weights).sum() * self.weight for name, loss in found.items()} | losses

    def _joint_losses(
        self, features: Mapping[int, Tensor], refined: Mapping[int, Tensor], weights: Tensor, real: int
    ) -> dict[str, Tensor]:
        """Return the adapters' losses in proportion to the records of this part of the batch, so that parts add up.

        real: the number of records before those that only fill up.
        """
        assert self.joint is not None
        if not real:
            zero = 0.0 * torch.stack([x.sum() for x in refined.values()]).sum()
            return dict.fromkeys(self.joint.weights, zero)
        losses = self.joint.losses(
            {b: x[:real] for b, x in features.items()}, {b: x[:real] for b, x in refined.items()}
        )
        return {name: loss * weights.sum() for name, loss in losses.items()}


class Distiller(nn.Module):
    """The module with all that is trained: a student, and what it has for each teacher. It computes the losses."""

    def __init__(self, student: Backbone, branches: Sequence[TeacherBranch]) -> None:
        super().__init__()
        self.student = student.model
        self.branches = list(branches)
        # A single teacher has no name in parameters and losses.
        trained = {branch.name: nn.ModuleDict(branch.trained) for branch in branches}
        named = trained if len(branches) > 1 else branches[0].trained
        for name, module in named.items():
            self.add_module(name, module)
        self.blocks = sorted({block for branch in branches for read in branch.read.values() for block in read})
        freeze_unused(self.student, self.blocks[-1], student.image_size)
        # Convolutions on a GPU take channels-last tensors without converting them.
        maps = not student.gives_tokens and branches[0].targets.device.type == "cuda"
        self.memory_format = torch.channels_last if maps else torch.contiguous_format
        if maps:
            self.student.to(memory_format=torch.channels_last)
        self.dropout: PatchDropout | None = None

    def measured(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses, and {teacher block: squares} of its normalised targets; call it in eval mode only."""
        losses, named = self(batch), len(self.branches) > 1
        errors = {f"{h.name}.{b}" if named else str(b): x for h in self.branches for b, x in h.errors.items()}
        return losses, errors

    def drop_patches(self) -> None:
        """Let the student see a share of its patches (`dropout.share`). Raises UserError if this is not possible."""
        for branch in self.branches:
            branch.targets.check_kept()
        self.dropout = install(self.student)

    def decoded(self, batch: Batch) -> Batch:
        """Return a batch with the features of each teacher decoded, if they are in their stored form."""
        pairs = zip(self.branches, batch.teacher_features, strict=True)
        return replace(batch, teacher_features=[branch.targets.decoded(features) for branch, features in pairs])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses; their sum is minimised."""
        images = batch.images.contiguous(memory_format=self.memory_format)
        outputs = block_outputs(self.student, images, self.blocks)
        kept = self.dropout.kept if self.dropout is not None else None
        losses: dict[str, Tensor] = {}
        for branch, features in zip(self.branches, batch.teacher_features, strict=True):
            shown = branch.targets.decoded(features)
            found = branch.losses(outputs, shown, batch.weights, batch.labels, batch.filling, kept)
            prefix = f"{branch.name}." if len(self.branches) > 1 else ""
            losses |= {f"{prefix}{name}": loss for name, loss in found.items()}
        return losses


def _reads(kind: type[Projector], block: int) -> range:
    """Return the student's blocks that a projector of this kind reads for a matched block."""
    return range(block + 1) if kind.reads_all else range(block, block + 1)


def squares(wanted: Tensor, found: Tensor) -> Tensor:
    """Return (2,): the sums of squares of the error, and of the targets' distance from their mean of each channel."""
    spread = wanted - wanted.mean((0, 1), keepdim=True)
    return torch.stack([(wanted - found).square().sum(), spread.square().sum()])
