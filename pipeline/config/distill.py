"""The section of the configuration that says how students are trained on the features of teachers."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field, model_validator

from pipeline.config.fields import key
from pipeline.config.kinds import LOCAL_COPY_GB, Above, Fraction, LocalCopy, Share, UserPath
from pipeline.config.training import TrainingConfig
from singer.errors import UserError

Objectives = Annotated[dict[str, Above], Field(min_length=1)]
Blocks = Annotated[tuple[int, ...], Field(min_length=1)]


class DistillConfig(TrainingConfig):
    """The training of a student."""

    section: ClassVar[str] = "distill"

    objective: str | Objectives | tuple[str | Objectives, ...] = key(
        "mse",
        "a name, or names with weights: {mse: 1, logits: 0.5}; with several caches one, or a list with one for each",
    )
    projector: str | None = key(
        None,
        "how tokens are brought to the teacher's width: a name among singer/projectors; not part of the student; "
        "default: ladder for students with one grid of tokens, if it multiplies no more than the student itself; else, "
        "and in joint training, linear",
    )
    block_weights: tuple[Above, ...] | None = key(
        None, "weights of the teacher's blocks, in their order, for objectives of blocks; default: equal weights"
    )
    texts: UserPath | None = key(None, "zero-shot: .npy of text embeddings, (texts, width of the teacher's output)")
    joint: bool = key(False, "train fresh adapters (section refine) with the student, as the paper does")
    kd_weight: Above = key(
        1.0, "weight of the objective; in joint training, the adapters' losses have weights of their own"
    )
    trained: Annotated[tuple[str, ...], Field(min_length=1)] | None = key(
        None,
        "which weights of the student are trained, by their names or the beginnings of these, such as [reg_token, "
        "blocks.11]; default: all",
    )
    token_share: Fraction | None = key(
        None,
        "share of its patches that the student sees, another random set for every image and step; cheaper steps; "
        "default: half of them, where the student can leave out patches and its objectives compare token by token; "
        "else, and in joint training, all",
    )
    whole_share: Share = key(0.25, "share of the steps, at the end, in which the student sees all patches")
    mask_share: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0,
        "share of its patches that a mask token hides from the student when it sees each batch a second time, to learn "
        "the teacher's tokens at these places (Proteus); 0: no second time",
    )
    mask_weight: Above = key(
        1.0, "mask_share: weight of the loss of masked patches beside that of what the student sees"
    )
    share: Fraction = key(1.0, "share of the images that are trained on", shared=True)
    share_by: Literal["random", "el2n", "prototypes", "loss"] = key(
        "random",
        "what chooses these images: chance; how unsure the teacher's head is (el2n); the distance of its CLS from the "
        "nearest of at most 100 k-means centres (prototypes); or the loss of the student of share_run (loss)",
        shared=True,
    )
    share_run: UserPath | None = key(
        None,
        "loss: a finished run of distill from the same cache, by whose loss images are scored; best one that was "
        "trained on few of them",
        shared=True,
    )
    share_keep: Literal["hard", "easy"] = key(
        "hard", "el2n, prototypes, loss: whether the images with the highest or the lowest scores are kept", shared=True
    )
    overlap: Literal["none", "other", "average"] = key(
        "none",
        "how other stored views of an image teach the patches of a view, where they show the same places; CLS is "
        "taught by its own view. other: the patches of one other view, and elsewhere nothing; an image needs two "
        "views, and twice as much is read. average: means over the view itself and at most three others; up to four "
        "times as much is read",
        shared=True,
    )
    teacher: str | tuple[str | None, ...] | None = key(
        None,
        "which of a cache's teachers, by its variant; default: the refiner's, or the first; with several caches a list",
        shared=True,
    )
    blocks: Blocks | Annotated[tuple[Blocks | None, ...], Field(min_length=1)] | None = key(
        None,
        "which of the teacher's blocks; default: the refiner's, or all; with several caches a list of lists",
        shared=True,
    )
    teacher_weights: tuple[Above, ...] | None = key(
        None, "with several caches: weight of each teacher's objective; default: equal weights that add up to 1"
    )
    teacher_drop: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "with several caches: probability that a teacher does not count for an image, unless its loss is largest"
    )
    local_copy: UserPath | None = key(
        None, "folder to which Zarr shards are copied when they are first read", "place", shared=True
    )
    local_copy_gb: Above | None = key(None, LOCAL_COPY_GB, "speed", shared=True)

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        """Raise UserError if keys do not fit together."""
        if self.share == 1 and self.share_by != "random":
            raise UserError(f"share_by: {self.share_by} has no effect with share=1 (give --set distill.share=0.5)")
        if self.share_by == "random" and self.share_keep != "hard":
            raise UserError("share_keep: easy is about scores; give one (--set distill.share_by=el2n, or prototypes)")
        if self.share_by == "loss" and self.share_run is None:
            raise UserError("share_by: loss is that of a trained student; give its run (--set distill.share_run=RUN)")
        if self.share_by != "loss" and self.share_run is not None:
            raise UserError(f"share_run: {self.share_by} needs no run; set distill.share_by=loss, or leave it out")
        if not self.mask_share and self.mask_weight != 1:
            raise UserError(
                f"mask_weight: {self.mask_weight:g} is about masked patches; mask some (--set distill.mask_share=0.4), "
                "or leave it out"
            )
        if self.overlap != "none" and self.joint:
            raise UserError("overlap: adapters that are trained with the student see one view; set joint=false")
        for blocks in filter(None, self.blocks_by_teacher or ()):
            if wrong := self._unweighted(blocks):
                raise UserError(wrong)
        LocalCopy.of(self.local_copy, self.local_copy_gb)
        return self

    @property
    def local_copies(self) -> LocalCopy | None:
        """Return where Zarr shards are copied to."""
        return LocalCopy.of(self.local_copy, self.local_copy_gb)

    @property
    def objectives(self) -> dict[str, float]:
        """Return the objectives as {name: weight}; with a list, those of all teachers."""
        given = self.objective if isinstance(self.objective, tuple) else (self.objective,)
        return {name: weight for one in given for name, weight in _weighted(one).items()}

    def objectives_of(self, teachers: int) -> list[dict[str, float]]:
        """Return {name: weight} for each of several teachers. Raises UserError if a list has another length."""
        if not isinstance(self.objective, tuple):
            return [_weighted(self.objective)] * teachers
        if len(self.objective) != teachers:
            raise UserError(
                f"distill.objective: {len(self.objective)} given for {teachers} --cache; give one, or one for each"
            )
        return [_weighted(one) for one in self.objective]

    @property
    def teachers(self) -> tuple[str | None, ...] | None:
        """Return one teacher for each cache, or None if no teacher is named."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def blocks_by_teacher(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """Return the blocks for each cache, or None if no blocks are named."""
        if self.blocks is None or not all(isinstance(b, int) for b in self.blocks):
            return cast("tuple[tuple[int, ...] | None, ...] | None", self.blocks)
        return (cast("tuple[int, ...]", self.blocks),)

    def weights_of(self, blocks: Sequence[int]) -> dict[int, float] | None:
        """Return {block: weight} of a teacher, None if all weigh the same. Raises UserError if the numbers differ."""
        if self.block_weights is None:
            return None
        if wrong := self._unweighted(blocks):
            raise UserError(f"distill.{wrong}")
        return dict(zip(sorted(blocks), self.block_weights, strict=True))

    def _unweighted(self, blocks: Sequence[int]) -> str:
        """Return what is wrong with block_weights for these blocks of a teacher; "" if nothing is."""
        weights, known = self.block_weights, ", ".join(map(str, sorted(blocks)))
        if weights is None or len(weights) == len(blocks):
            return ""
        return f"block_weights: {len(weights)} weights for {len(blocks)} blocks; give one for each of {known}"


def _weighted(objective: str | dict[str, float]) -> dict[str, float]:
    return {objective: 1.0} if isinstance(objective, str) else dict(objective)
