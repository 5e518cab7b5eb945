"""The sections of the configuration that say how refiners are fitted and students are trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from pipeline.config.fields import Section, key
from pipeline.config.kinds import (
    Above,
    Below,
    Fraction,
    InputSize,
    LocalCopy,
    NotNegative,
    Positive,
    Seed,
    Share,
    UserPath,
)
from pipeline.config.loop import TrainingConfig
from singer.errors import UserError

# What the paper and its authors' code do where they differ from this project. Keys that the user gives win over these.
_PAPER = {
    "cleaner": "adapter", "normaliser": "none", "rank": 64, "start": "doubled", "quantile": 0.97,
    "outlier_weight": 0.01, "info_weight": 1.0, "keep_weight": 0.0, "expect_weight": 0.0, "lr": 1e-2,
    "weight_decay": 1e-4,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "singer": {},
    "paper": {**_PAPER, "basis": "weights", "outlier_form": "paper", "info_form": "paper"},
    "official": {**_PAPER, "basis": "weights-official", "outlier_form": "official", "info_form": "official"},
}
# The keys of which a variant may have values of its own.
VARIED = frozenset(key for values in VARIANTS.values() for key in values)
LOCAL_COPY_GB = (
    "what all copies in that folder may take, in GB; those unused for longest are removed first, and none that was "
    "used in the last ten minutes; default: no limit"
)
# These keys apply only to cleaners that are trained.
_TRAINED = ("trained",)


class RefineConfig(Section):
    """The cleaner of artifacts, its fit on the cache, and the normalisation of the targets after it."""

    variant: Literal["singer", "paper", "official"] = key(
        "singer", "sets the keys below as this project, the paper or its authors' code has them", only=_TRAINED
    )
    cleaner: str = key("gated-adapter", "how artifacts are removed: a name among singer/cleaners.py")
    normaliser: str = key("standardize", "how cleaned targets are scaled: a name among singer/normalisers.py")
    rank: Positive | Literal["auto"] = key(
        16,
        "adapters: their rank; auto: where artifact energy removed is farthest above drift, for each block",
        only=_TRAINED,
    )
    basis: str = key(
        "artifact", "the subspace in which adapters start: a name among singer/subspaces.py", only=_TRAINED
    )
    start: Literal["identity", "doubled"] = key(
        "identity",
        "adapter: up = 0 (identity), or the paper's up = down transposed (doubled); gated-adapter starts in one way",
        only=_TRAINED,
    )
    softness: NotNegative = key(
        1.0, "projector: cost of a change that the final norm sees; 0 gives the neighbours' mean"
    )
    threshold_k: Above = key(6.0, "a patch token is an artifact above median + k sigma (robust) of its block's norms")
    quantile: Below = key(0.97, "γ of the paper's outlier forms", only=_TRAINED)
    outlier_form: str = key("robust", "form of L_outlier: robust, paper or official", only=_TRAINED)
    info_form: str = key("clean", "form of L_info: clean, paper or official", only=_TRAINED)
    outlier_weight: NotNegative = key(1.0, "weight of L_outlier", only=_TRAINED)
    info_weight: NotNegative = key(1.0, "weight of L_info", only=_TRAINED)
    keep_weight: NotNegative = key(1.0, "weight of L_keep", only=_TRAINED)
    expect_weight: NotNegative = key(1.0, "weight of L_expect", only=_TRAINED)
    steps: Positive = key(2000, "largest number of steps; the fit ends earlier when it has converged", only=_TRAINED)
    tolerance: NotNegative = key(
        0.02,
        "smaller relative gains of the loss in 50 steps lower the learning rate, and then end the fit",
        only=_TRAINED,
    )
    batch_size: Positive = key(32, "records in a step", only=_TRAINED)
    lr: Above = key(1e-3, "learning rate", only=_TRAINED)
    weight_decay: NotNegative = key(0.0, "weight decay of the adapters", only=_TRAINED)
    holdout: Below = key(0.05, "share of the records that is kept for the figures")
    statistics_records: Positive = key(4096, "records from which thresholds and statistics come")
    sample_records: Positive = key(512, "records from which subspaces and curvature come")
    seed: Seed = key(0, "seed of the split of the records and of the fit")
    teacher: str | None = key(None, "which of a cache's teachers, by its variant; default: the first")
    blocks: tuple[int, ...] | None = key(None, "which of the teacher's blocks; default: all")
    local_copy: UserPath | None = key(None, "folder to which Zarr shards are copied when they are first read", "place")
    local_copy_gb: Above | None = key(None, LOCAL_COPY_GB, "speed")

    @property
    def local_copies(self) -> LocalCopy | None:
        """Return where Zarr shards are copied to."""
        return LocalCopy.of(self.local_copy, self.local_copy_gb)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Return {name of a loss of adapters: its weight}, of those that are computed."""
        more = {"keep": self.keep_weight, "expect": self.expect_weight}
        return {
            "outlier": self.outlier_weight,
            "info": self.info_weight,
            **{name: weight for name, weight in more.items() if weight},
        }

    @model_validator(mode="after")
    def _check(self) -> "RefineConfig":
        LocalCopy.of(self.local_copy, self.local_copy_gb)
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, given: Any) -> Any:
        """Put the values of the variant below those that are given."""
        variant = given.get("variant") if isinstance(given, dict) else None
        return {**VARIANTS[variant], **given} if isinstance(variant, str) and variant in VARIANTS else given


# What student.init may say besides a path.
STARTS = ("auto", "teacher", "random")


class StudentConfig(Section):
    """Any model that can be a teacher, named in the same way, or `vit` with the dimensions given here."""

    name: str = key("vit", "a name as teacher.name has it, or vit: a plain Vision Transformer of the dimensions below")
    dim: Positive | None = key(None, "vit: width", shape=True)
    depth: Positive | None = key(None, "vit: number of blocks", shape=True)
    heads: Positive | None = key(None, "vit: attention heads", shape=True)
    mlp_ratio: Above | None = key(None, "vit: hidden units of a block's MLP for each channel; default: 4", shape=True)
    patch_size: InputSize | None = key(
        None, "a patch in pixels, one number or [height, width]; default: the model's", shape=True
    )
    registers: Annotated[int, Field(ge=0)] | None = key(
        None, "number of register tokens of a Vision Transformer of timm; default: the model's"
    )
    image_size: InputSize | None = key(
        None, "input in pixels, one number or [height, width]; default: the teacher's in the cache"
    )
    pretrained: bool = key(False, "start from the weights that timm or the hub has for the name")
    init: str = key(
        "auto",
        "weights to start from: teacher (cut out of the teacher's), random, or the path of a run, timm model folder "
        "or of a file; auto: the teacher's if they fit",
    )
    init_blocks: Literal["first", "even"] = key(
        "first", "which blocks of a deeper model the student starts from: its first ones, or evenly spaced ones"
    )
    exit: Literal["plain", "lift", "wide"] = key(
        "plain",
        "last block of a Vision Transformer of timm: as the others, with a linear map to exit_width after it (lift), "
        "or itself that wide (wide)",
    )
    exit_width: Positive | None = key(None, "lift, wide: channels of the last block; default: the first teacher's")
    drop_path: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "stochastic depth: rate of the last block")
    checkpointing: bool = key(False, "recompute activations in the backward pass, to save memory")

    @property
    def starts_from(self) -> Path | None:
        """Return the run, model folder or file that init names, if it names one."""
        return None if self.init in STARTS else Path(self.init).expanduser()

    @model_validator(mode="after")
    def _check(self) -> "StudentConfig":
        if self.exit == "plain" and self.exit_width is not None:
            raise UserError("exit_width: only a wider exit has it; give one (--set student.exit=wide, or lift)")
        return self


class DistillConfig(TrainingConfig):
    """The training of a student."""

    section: ClassVar[str] = "distill"

    objective: str | dict[str, Above] | tuple[str | dict[str, Above], ...] = key(
        "mse",
        "a name, or names with weights: {mse: 1, logits: 0.5}; with several caches one, or a list with one for each",
    )
    projector: str = key(
        "linear",
        "how tokens are brought to the teacher's width: a name among singer/projectors; not part of the student",
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
    token_share: Fraction = key(
        1.0, "share of its patches that the student sees, another random set for every image and step; cheaper steps"
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
    overlap: bool = key(
        False,
        "the patches of a view are taught by those of another stored view of its image, where both show the same, and "
        "elsewhere by none; CLS by its own. An image needs two views; twice as much is read",
        shared=True,
    )
    teacher: str | tuple[str | None, ...] | None = key(
        None,
        "which of a cache's teachers, by its variant; default: the refiner's, or the first; with several caches a list",
        shared=True,
    )
    blocks: tuple[int, ...] | tuple[tuple[int, ...] | None, ...] | None = key(
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
        if self.overlap and self.joint:
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
