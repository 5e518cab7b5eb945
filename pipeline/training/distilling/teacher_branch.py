"""What a student trains for one teacher, and how both sides' tokens are brought into one form and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.cache.stored import Decoded, Encoded
from pipeline.models.backbone import Backbone
from pipeline.models.student_exits import has_exit
from pipeline.training.batch import Batch
from pipeline.training.distilling.joint_training import JointTraining
from pipeline.training.distilling.targets import Targets
from singer.errors import UserError
from singer.objectives import OBJECTIVES, Mixture, Tokens
from singer.objectives.relation import makes_attention, queries_keys_values
from singer.patch_masks import only_masked
from singer.projectors import PROJECTORS, Ladder, Projection, Projectors, ProjectorSpec
from singer.suffix import has_first_norm
from singer.tokens import select_tokens


@dataclass(frozen=True)
class Teaching:
    """How a student is taught by one teacher.

    objectives: {name: weight}; projector: a name among singer.projectors, None for the default of distill.projector;
    block_weights: {the teacher's block: weight}, None for equal ones; weight: of the sum of the objectives; name: of
    the teacher, among several.
    """

    objectives: Mapping[str, float]
    projector: str | None = None
    block_weights: Mapping[int, float] | None = None
    weight: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class BatchTargets:
    """A teacher's refined tokens of a batch that are compared, and which patches they are, (B, k), None for all.

    adapter_losses: {name: loss} of the adapters that refine them in joint training; else empty.
    """

    refined: Tokens
    positions: Tensor | None
    adapter_losses: Mapping[str, Tensor]


class TeacherBranch:
    """The projectors, objective and, in joint training, adapters that a student trains for one teacher.

    A projector brings tokens to the teacher's width at every matched block. The adapters refine the targets.
    matching: {teacher block: student block}; whole: whether the student always sees all patches.
    """

    def __init__(
        self,
        student: Backbone,
        matching: dict[int, int],
        targets: Targets,
        teaching: Teaching,
        joint: JointTraining | None = None,
        whole: bool = True,
    ) -> None:
        self.name, self.weight = teaching.name, teaching.weight
        self.targets, self.joint = targets, joint
        self.prefix, self.layout = student.prefix, student.layout
        objectives = teaching.objectives
        context = targets.objective_context(tuple(matching), [OBJECTIVES[o] for o in objectives], whole)
        made = {o: OBJECTIVES[o](context) for o in objectives}
        self.objective = Mixture(made, objectives, teaching.block_weights)

        # The blocks whose targets are compared normalised, and those that are compared in the teacher's units.
        self.normalised_blocks = self.objective.reads(in_teacher_units=False)
        self.cleaned_blocks = self.objective.reads(in_teacher_units=True)
        self.projector = teaching.projector or self._default_projector(student, matching)
        kind = PROJECTORS[self.projector]

        def projectors(blocks: Sequence[int]) -> nn.Module | None:
            """Build projectors for the compared blocks only: a projector without a gradient would stop DDP."""
            return kind.of_blocks({t: self._spec(matching[t], t, kind) for t in blocks}) if blocks else None

        self.projectors, self.unit_projectors = projectors(self.normalised_blocks), projectors(self.cleaned_blocks)
        if has_exit(student.model) and self.projector == "linear" and isinstance(self.projectors, Projectors):
            # A linear map after an exit that is as wide as the teacher would undo what the exit is for.
            for t in (t for t in self.normalised_blocks if self._is_exit(matching[t], t)):
                self.projectors[str(t)] = nn.Identity()
        self.matching = {t: matching[t] for t in sorted({*self.normalised_blocks, *self.cleaned_blocks})}
        # {teacher block: the student's blocks that its projectors read}.
        self.read = {t: _reads(kind, b) for t, b in self.matching.items()}
        # {teacher block: student block whose output the compared attention reads}, and the blocks with that attention.
        last = len(self.layout) - 1
        self.attention_inputs = {t: min(matching[t], last - 1) for t in self.objective.attends()}
        self.attention = {t: attention_of(student, s + 1) for t, s in self.attention_inputs.items()}
        # {teacher block: the grid of the student's tokens}.
        self.grids = {t: self.layout[b][1] for t, b in (self.attention_inputs | self.matching).items()}

    def _default_projector(self, student: Backbone, matching: Mapping[int, int]) -> str:
        """Return "ladder" for one grid of tokens, if it multiplies no more than the student itself; else "linear".

        At equal time it was better where it multiplied half to four fifths as much (docs/results.md, "Equal time").
        """
        compared = [*self.normalised_blocks, *self.cleaned_blocks]
        if len({self.layout[b][1] for t in compared for b in _reads(Ladder, matching[t])}) > 1:
            return "linear"
        cost = sum(Ladder.multiplications(self._spec(matching[t], t, Ladder)) for t in compared)
        # A token meets nearly all weights once.
        return "ladder" if cost <= sum(p.numel() for p in student.model.parameters()) else "linear"

    def _is_exit(self, block: int, teacher_block: int) -> bool:
        """Return whether a block is the last one, and as wide as the teacher."""
        return block == len(self.layout) - 1 and self.layout[block][0] == self.targets.width(teacher_block)

    def _spec(self, block: int, teacher_block: int, kind: type[Projection]) -> ProjectorSpec:
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
        adapters = None if self.joint is None else self.joint.adapters
        modules = {"projectors": self.projectors, "unit_projectors": self.unit_projectors, "adapters": adapters}
        kept = {name: m for name, m in modules.items() if m is not None and next(m.parameters(), None) is not None}
        return {"objective": self.objective, **kept}

    @property
    def blocks(self) -> set[int]:
        """Return the student's blocks whose outputs are needed."""
        return {*(b for read in self.read.values() for b in read), *self.attention_inputs.values()}

    @property
    def links(self) -> dict[int, int]:
        """Return {teacher block: student block} of all that is compared."""
        return dict(sorted((self.attention_inputs | self.matching).items()))

    def targets_of(self, features: Encoded | Decoded, batch: Batch) -> BatchTargets:
        """Return the targets of a batch."""
        decoded = self.targets.decode(features)
        if self.joint is None:
            refined = self.targets.refine(decoded.blocks)
            losses: dict[str, Tensor] = {}
        else:
            adapted, losses = self.joint.refine(decoded.blocks, batch)
            refined = Tokens(adapted, adapted)
        normalised = {b: refined.normalised[b] for b in self.normalised_blocks}
        cleaned = {b: refined.cleaned[b] for b in sorted({*self.cleaned_blocks, *self.attention})}
        if batch.places is not None and batch.average:
            normalised, cleaned = (self.targets.averages(x, batch.places) for x in (normalised, cleaned))
        return BatchTargets(Tokens(normalised, cleaned), decoded.positions, losses)

    def compare(
        self,
        outputs: Mapping[int, Tensor],
        of_batch: BatchTargets,
        batch: Batch,
        kept: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Bring the student's outputs and the teacher's features to one form; return both.

        outputs: {student block: (B, N, d)}; kept: (B, k), the only patches that the student saw, None for all; masked:
        (B, patches), those that are compared, None for all tokens.
        """
        targets, refined, positions = self.targets, of_batch.refined, of_batch.positions
        student = self.tokens(outputs, positions, kept)
        if batch.places is None or batch.average:
            wanted = Tokens(*(targets.target_tokens(x, positions, kept) for x in (refined.normalised, refined.cleaned)))
        else:
            wanted = Tokens(targets.overlap_tokens(refined.normalised, student.normalised, batch.places, kept))
        if masked is not None:
            own = masked if kept is None else masked.gather(1, kept)
            wanted = Tokens({b: only_masked(x, student.normalised[b], own) for b, x in wanted.normalised.items()})
        return student, wanted

    def tokens(self, outputs: Mapping[int, Tensor], positions: Tensor | None, kept: Tensor | None = None) -> Tokens:
        """Project the student's tokens to the teacher's width, at the places of the targets.

        outputs: {student block: (B, N, d)}; positions: (B, k), those of sampled patches; kept: see compare.
        """
        own = {b: select_tokens(outputs[b], self.prefix, self.targets.keep_cls) for b in self.blocks}
        read = {t: [own[b] for b in blocks] for t, blocks in self.read.items()}
        grids = self.grids if kept is None else None
        normalised, cleaned = (
            projectors(read, grids) if projectors is not None else {}
            for projectors in (self.projectors, self.unit_projectors)
        )
        attention = {
            t: queries_keys_values(block.attn, block.norm1(own[self.attention_inputs[t]]))
            for t, block in self.attention.items()
        }
        found = (normalised, cleaned, attention)
        return Tokens(*(self.targets.student_tokens(x, grids, positions) for x in found))

    def check_tokenwise(self, off: str, why: str) -> None:
        """Raise UserError if some patches of an image cannot be left out of the loss.

        off, why: as for Targets.check_whole.
        """
        self.targets.check_whole(off, why)
        for name, objective in self.objective.objectives.items():
            if not getattr(objective, "tokenwise", False):
                known = ", ".join(n for n, o in OBJECTIVES.items() if o.tokenwise)
                raise UserError(
                    f"distill.{off.partition('=')[0]}: objective {name} does not compare token by token, so that no "
                    f"patch can be left out of it; take one of {known}, or set distill.{off}"
                )


def _reads(kind: type[Projection], block: int) -> range:
    """Return the student's blocks that a projector of this kind reads for a matched block."""
    return range(block + 1) if kind.reads_all else range(block, block + 1)


def attention_of(student: Backbone, number: int) -> Any:
    """Return a block of the student that makes queries, keys and values together. Raises UserError if it does not."""
    blocks = getattr(student.model, "blocks", ())
    block = blocks[number] if 0 < number < len(blocks) else nn.Identity()
    if not (makes_attention(getattr(block, "attn", None)) and hasattr(block, "norm1") and has_first_norm(block)):
        raise UserError(
            "distill.objective minilm and tinymim need a student with two blocks or more that have norm1 and attn.qkv, "
            "in this order, such as vit; use relation for others"
        )
    return block


def errors(student: Tokens, targets: Tokens) -> dict[int, Tensor]:
    """Return {block: squares} of normalised targets."""
    return {block: squares(x, student.normalised[block]) for block, x in targets.normalised.items()}


def squares(wanted: Tensor, found: Tensor) -> Tensor:
    """Return what explained_variance needs of targets (B, N, d) and what was found; those of several batches add up.

    (3 + d,) float64: the sums of squares of the error and of the targets, their number, and their sums by channel.
    """
    x, error = (part.double().flatten(0, 1) for part in (wanted, wanted - found))
    count = x.new_full((), len(x))
    return torch.cat([torch.stack([error.square().sum(), x.square().sum(), count]), x.sum(0)])


def explained_variance(sums: Tensor) -> float:
    """Return the share of the variance of the targets, around their mean of each channel, that was found."""
    error, square, count = sums[:3]
    return 1 - float(error / (square - sums[3:].square().sum() / count))
