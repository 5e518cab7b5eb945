"""What an objective is, and what it may read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from singer.suffix import TeacherSuffix


@dataclass(frozen=True)
class ObjectiveContext:
    """What student and teacher tokens have in common: matched teacher blocks, width, prefix tokens (0 or CLS), grid.

    width, grid: of the last matched block; widths: of each. grid: (rows, columns) of the patch tokens; None where only
    some patches of each image are compared. suffix: the frozen suffix of the teacher; teacher_prefix: number of its CLS
    and register tokens. classes: number of classes of the labels, 1 if all are of one, None without labels; texts: text
    embeddings, as wide as the teacher's output, if given.
    """

    blocks: tuple[int, ...]
    width: int
    prefix: int
    grid: tuple[int, int] | None
    suffix: TeacherSuffix | None = None
    teacher_prefix: int = 1
    classes: int | None = None
    texts: Tensor | None = None
    widths: Mapping[int, int] = field(default_factory=dict)

    def width_of(self, block: int) -> int:
        """Return the width of a block's tokens; blocks that are not in `widths` are as wide as the last."""
        return self.widths.get(block, self.width)


@dataclass(frozen=True)
class Tokens:
    """Tokens on the two scales on which objectives compare them, each {teacher block: (B, N, d)}.

    normalised: on the scale of the normaliser; cleaned: in the teacher's units; attention: of a student, queries, keys
    and values of its own, (B, N, 3 · its width). A mapping that no objective reads is empty.
    """

    normalised: Mapping[int, Tensor] = field(default_factory=dict)
    cleaned: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """(student tokens, targets), both {teacher block: (B, N, d)}, labels (B,) -> {part: losses (B,)}, one per record.

    The student's tokens are projected to the teacher's width. Targets are refined and normalised. For an objective with
    in_teacher_units they are only refined, and the student has separate projectors for it, so that frozen parts of
    the teacher can read both. An objective with own_attention compares the student's own queries, keys and values,
    which are not projected, with targets in the teacher's units. Parameters of an objective are trained with the
    student. It draws all random numbers from torch's global generator, as dropout does. A tokenwise objective is a mean
    over losses of single tokens, each of which is 0 without a gradient where the student's token equals the target. The
    losses of a batchwise objective depend on chance or on the other records of the batch, outside of training, too. An
    objective with needs_all_patches cannot be used where some patches of an image are left out.
    """

    tokenwise = False
    batchwise = False
    in_teacher_units = False
    own_attention = False
    needs_all_patches = False

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__()
        self.context = context  # not a module: the suffix in it, which is frozen, is neither trained nor stored

    def reads(self) -> tuple[int, ...]:
        """Return the blocks at which it compares tokens; the student learns nothing about others from it."""
        return self.context.blocks

    @property
    def suffix(self) -> TeacherSuffix:
        """Return the teacher's suffix, which must be there."""
        assert self.context.suffix is not None
        return self.context.suffix

    def forward(
        self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {part: losses (B,)}; by default one part for each block in targets."""
        return {str(b): self.block_loss(student[b], target, b) for b, target in targets.items()}

    def soft_targets(self, targets: Mapping[int, Tensor]) -> Tensor | None:
        """Return what an objective averages over the teachers (B, ...); None if it compares with each teacher alone."""
        return None

    def loss_to_mean(self, student: Mapping[int, Tensor], mean: Tensor) -> dict[str, Tensor]:
        """Return {part: losses (B,)} from the mean of the teachers' soft targets, see soft_targets."""
        raise NotImplementedError

    def block_loss(self, student: Tensor, target: Tensor, block: int) -> Tensor:
        """Compute losses (B,) of one block's tokens (B, N, d)."""
        raise NotImplementedError


class LastBlock(Objective):
    """An objective that compares the tokens of the last matched block alone, `block`."""

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        self.block = context.blocks[-1]

    def reads(self) -> tuple[int, ...]:
        """Return the last matched block."""
        return (self.block,)

    def forward(
        self, student: Mapping[int, Tensor], targets: Mapping[int, Tensor], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {part: losses (B,)}, see compare."""
        return self.compare(student[self.block], targets[self.block])

    def compare(self, student: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return {part: losses (B,)} of the block's tokens (B, N, d)."""
        raise NotImplementedError
