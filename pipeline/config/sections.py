"""The sections of the configuration: one frozen, validated tree. Each key states what it is and what it affects."""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.fields import Section, key
from singer.errors import UserError

# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Below = Annotated[float, Field(gt=0, lt=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Rates = tuple[Above, ...]
# These tasks of `evaluate` have one label for each image.
_IMAGES = ("classification", "retrieval", "domain-shift", "head")


class PrepareConfig(Section):
    """A folder of images -> WebDataset shards."""

    layout: str = key("folder", "how the images are stored: a name among pipeline/data/importers/")
    split: str | None = key(None, "which split of a data set that has several")
    shard_images: Positive = key(1000, "images in a shard")
    classes: Path | None = key(None, "classes.json of another split, to number classes as there")
    on_error: Literal["fail", "skip"] = key("fail", "what to do with broken images", "failures")
    seed: Seed = key(0, "seed of the order of images")


class TeacherConfig(Section):
    """A timm VisionTransformer: hub name, `hf-hub:` or `local-dir:` name, or a name with a local weight file."""

    name: str = key(
        "vit_base_patch14_dinov2", "the model: a name in timm, hf-hub:USER/NAME or local-dir:FOLDER", "place"
    )
    weights: Path | None = key(None, "local .safetensors or .pth file; without it timm fetches the weights", "place")
    image_size: Positive | None = key(None, "side of the input in pixels; default: the teacher's own")


class ViewsConfig(Section):
    """Which crops of an image the teacher and the students see.

    All random choices are a pure function of (seed, key of the image, number of the view), and the index stores them.
    """

    count: Positive = key(1, "views of each image")
    kind: Literal["center", "random-resized-crop"] = key("center", "how a view is cut out")
    crop: Fraction = key(1.0, "center: share of the short side that is kept")
    scale: tuple[Fraction, Fraction] = key((0.08, 1.0), "random-resized-crop: least and largest share of the area")
    ratio: tuple[Above, Above] = key((3 / 4, 4 / 3), "random-resized-crop: least and largest width / height")
    flip: Share = key(0.0, "probability of a mirrored view")
    color: tuple[Share, Share, Share, Hue] = key(
        (0.0, 0.0, 0.0, 0.0), "largest change of brightness, contrast and saturation; shift of hue in turns"
    )
    seed: Seed = key(0, "seed of everything that is drawn")
    pixels: Literal["none", "jpeg", "uint8"] = key(
        "none", "whether the views are stored too, so that students need no images"
    )
    pixel_size: Positive | None = key(None, "side of the stored views in pixels; default: the teacher's input")
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = key(90, "quality of stored JPEGs")

    @model_validator(mode="after")
    def _check(self) -> "ViewsConfig":
        """Raise UserError if keys do not fit together."""
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name}: {low} is larger than {high}")
        if self.count > 1 and self.kind == "center" and not self.flip and not any(self.color):
            raise UserError("count: center views are all alike; choose kind random-resized-crop, flip or color")
        return self


class CacheConfig(Section):
    """Which features are stored, and how."""

    blocks: tuple[int, ...] | None = key(None, "numbers from 0 on; default: the block at 3/4 of the depth and the last")
    codec: str = key("float16", "how features are stored: float16, bfloat16, int8, int4, int3, int2 or int1")
    token_share: Fraction = key(1.0, "share of the patch tokens that is stored, a fixed random set for every record")
    on_error: Literal["fail", "skip"] = key("fail", "what to do with broken images and shards", "failures")
    batch_size: Positive = key(64, "views in a forward pass of the teacher")
    precision: Precision = key("no", "autocast of the teacher's forward pass")
    shard_mb: Positive = key(128, "target size of a Zarr shard of one block, MB")
    workers: Positive = key(2, "threads that decode images", "speed")


# What the paper and its authors' code do where they differ from this project. Keys that the user gives win over these.
_PAPER = {
    "cleaner": "adapter", "normaliser": "none", "rank": 64, "start": "doubled", "quantile": 0.97,
    "outlier_weight": 0.01, "info_weight": 1.0, "keep_weight": 0.0, "weight_decay": 1e-4,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "singer": {},
    "paper": {**_PAPER, "basis": "weights", "outlier_form": "paper", "info_form": "paper"},
    "official": {**_PAPER, "basis": "weights-official", "outlier_form": "official", "info_form": "official"},
}
# These keys apply only to cleaners that are trained.
_TRAINED = ("trained",)


class RefineConfig(Section):
    """The cleaner of artifacts, its fit on the cache, and the normalisation of the targets after it."""

    variant: Literal["singer", "paper", "official"] = key(
        "singer", "sets the keys below as this project, the paper or its authors' code has them", only=_TRAINED
    )
    cleaner: str = key("neighbour", "how artifacts are removed: a name among singer/cleaners.py", only=_TRAINED)
    normaliser: str = key(
        "standardize", "how cleaned targets are scaled: a name among singer/normalisers.py", only=_TRAINED
    )
    rank: Positive | Literal["auto"] = key(
        16,
        "adapter: its rank; auto: where artifact energy removed is farthest above drift, for each block",
        only=_TRAINED,
    )
    basis: str = key("weights", "the subspace in which adapters start: a name among singer/subspaces.py", only=_TRAINED)
    start: Literal["identity", "doubled"] = key(
        "identity", "adapter: up = 0 (identity), or the paper's up = down transposed (doubled)", only=_TRAINED
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
    steps: Positive = key(2000, "largest number of steps; the fit ends earlier when it has converged", only=_TRAINED)
    tolerance: NotNegative = key(
        0.02,
        "smaller relative gains of the loss in 50 steps lower the learning rate, and then end the fit",
        only=_TRAINED,
    )
    batch_size: Positive = key(32, "records in a step", only=_TRAINED)
    lr: Above = key(1e-2, "learning rate", only=_TRAINED)
    weight_decay: NotNegative = key(0.0, "weight decay of the adapters", only=_TRAINED)
    holdout: Below = key(0.05, "share of the records that is kept for the figures")
    statistics_records: Positive = key(4096, "records from which thresholds and statistics come")
    sample_records: Positive = key(512, "records from which subspaces and curvature come")
    seed: Seed = key(0, "seed of the split of the records and of the fit", only=_TRAINED)
    teacher: str | None = key(None, "which of a cache's teachers, by its variant; default: the first")
    blocks: tuple[int, ...] | None = key(None, "which of the teacher's blocks; default: all")
    local_copy: Path | None = key(None, "folder to which shards are copied when they are first read", "place")

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, given: Any) -> Any:
        """Put the values of the variant below those that are given."""
        variant = given.get("variant") if isinstance(given, dict) else None
        return {**VARIANTS[variant], **given} if isinstance(variant, str) and variant in VARIANTS else given


class StudentConfig(Section):
    """Any timm model with tokens or feature maps, or `vit` with the dimensions given here."""

    name: str = key("vit", "a model of timm, or vit: a plain Vision Transformer of the dimensions below")
    dim: Positive | None = key(None, "vit: width", shape=True)
    depth: Positive | None = key(None, "vit: number of blocks", shape=True)
    heads: Positive | None = key(None, "vit: attention heads", shape=True)
    patch_size: Positive | None = key(None, "side of a patch in pixels; default: the model's", shape=True)
    image_size: Positive | None = key(None, "side of the input in pixels; default: the teacher's in the cache")
    pretrained: bool = key(False, "start from the weights that timm has for the name")
    drop_path: Annotated[float, Field(ge=0, lt=1)] = key(0.0, "stochastic depth: rate of the last block")
    checkpointing: bool = key(False, "recompute activations in the backward pass, to save memory")


class DistillConfig(Section):
    """The training of a student."""

    objective: str | dict[str, Above] = key("mse", "a name, or names with weights: {mse: 1, logits: 0.5}")
    joint: bool = key(False, "train fresh adapters (section refine) with the student, as the paper does")
    kd_weight: Above = key(1.0, "joint: weight of the objective; the adapters' losses have weights of their own")
    epochs: Positive = key(100, "passes over the cache", shared=True)
    batch_size: Positive = key(256, "records in a step, over all processes", shared=True)
    lr: Above = key(1e-3, "peak learning rate")
    final_lr: Share = key(1e-4, "learning rate at the end, as a factor of lr")
    weight_decay: NotNegative = key(1e-4, "weight decay; norms, biases, tokens and positions do not decay")
    warmup_epochs: NotNegative = key(0.5, "epochs of linear warm-up; the paper takes 5 of 100")
    clip_grad: Above | None = key(None, "largest norm of the gradient")
    accumulate: Positive = key(1, "parts in which a batch goes through the model, to save memory")
    ema: Below | None = key(None, "decay per step of a moving average of the student; the average is then the result")
    compile: bool = key(False, "torch.compile the student")
    trackers: tuple[str, ...] = key(
        ("tensorboard",), "trackers of Accelerate: tensorboard, wandb, mlflow ...; log.jsonl is always written", "place"
    )
    precision: Precision = key("no", "mixed precision of training", shared=True)
    workers: Positive = key(2, "threads that decode images and read features", "speed", shared=True)
    checkpoint_minutes: Above = key(
        10.0, "largest number of minutes between checkpoints; there is also one after every epoch", "speed"
    )
    read_block: Positive = key(
        1, "neighbouring records that are read together; more for small records and disks that seek slowly", shared=True
    )
    shuffle_window: Positive = key(
        16384, "records within which such blocks are mixed; a small window is read in one piece", shared=True
    )
    seed: Seed = key(0, "seed of the student's weights and of the order of records", shared=True)
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
    local_copy: Path | None = key(
        None, "folder to which shards are copied when they are first read", "place", shared=True
    )

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        """Raise UserError if keys do not fit together."""
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs: a warm-up of {self.warmup_epochs:g} of {self.epochs} epochs never reaches the rate; "
                f"give fewer (--set distill.warmup_epochs={0.05 * self.epochs:g}), or more epochs"
            )
        if self.accumulate > self.batch_size:
            raise UserError(f"accumulate: a batch of {self.batch_size} records cannot have {self.accumulate} parts")
        if self.read_block > self.shuffle_window:
            raise UserError(
                f"read_block: {self.read_block} neighbouring records are more than a shuffle_window of "
                f"{self.shuffle_window}, which would mix nothing else; make the window larger"
            )
        return self

    @property
    def objectives(self) -> dict[str, float]:
        """Return the objectives as {name: weight}."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(self.objective)

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


class EvaluateConfig(Section):
    """Probes of a frozen model."""

    tokens: Literal["block", "norm", "both"] = key(
        "both", "output of the last block: raw (block), after the final norm (norm), or both where there is a norm"
    )
    image_size: Positive | None = key(None, "side of the input in pixels; default: the student's own")
    crop: Fraction = key(1.0, "share of the short side that is kept; dense tasks keep all", only=_IMAGES)
    batch_size: Positive = key(128, "images in a forward pass", "speed")
    workers: Positive = key(2, "threads that decode images", "speed")
    neighbours: Positive = key(20, "k of k-NN", only=("classification",))
    temperature: Above = key(0.07, "temperature of the votes of k-NN", only=("classification",))
    strengths: Rates = key(
        (0.01, 0.1, 1.0),
        "inverse L2 penalties; a split of the training shards decides which is taken",
        only=("classification", "domain-shift"),
        min_length=1,
    )
    seg_classes: Annotated[int, Field(ge=2, le=256)] | None = key(
        None, "classes of the masks, labels from 0 on; segmentation needs it", only=("segmentation",)
    )
    seg_ignore: Annotated[int, Field(ge=0, le=255)] = key(
        255, "label of pixels that do not count", only=("segmentation",)
    )
    seg_lrs: Rates = key(
        (1e-3, 3e-3, 1e-2, 3e-2),
        "learning rates; a split of the training shards decides which is taken",
        only=("segmentation",),
        min_length=1,
    )
    seg_passes: Positive = key(50, "passes over the training images", only=("segmentation",))
    depth_min: Above = key(0.001, "meters; pixels outside do not count", only=("depth",))
    depth_max: Above = key(10.0, "meters; pixels outside do not count", only=("depth",))
    depth_bins: Annotated[int, Field(ge=2)] = key(
        256, "bins, spread evenly from depth_min to depth_max", only=("depth",)
    )
    depth_lrs: Rates = key(
        (1e-3, 3e-3, 1e-2, 3e-2),
        "learning rates; a split of the training shards decides which is taken",
        only=("depth",),
        min_length=1,
    )
    depth_passes: Positive = key(50, "passes over the training images", only=("depth",))
    shots: tuple[Positive, Positive] | None = key(
        (20, 100),
        "few-shot classes have fewer training images than the first number, many-shot ones more than the second",
        "details",
        only=("classification",),
    )
    class_map: Path | None = key(
        None, 'JSON {"test label": train label}, or a list of train labels', only=("domain-shift", "head")
    )
    seed: Seed = key(0, "seed of splits and heads")

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        """Raise UserError if keys do not fit together."""
        if self.depth_min >= self.depth_max:
            raise UserError(f"depth_min: {self.depth_min} is not below depth_max, {self.depth_max}")
        if self.shots is not None and self.shots[0] > self.shots[1]:
            raise UserError(f"shots: {self.shots[0]} is larger than {self.shots[1]}")
        return self


class ExportConfig(Section):
    """What the export of a student contains."""

    output: Literal["pooled", "tokens"] = key(
        "pooled", "timm's forward, or raw output of the last block (onnx and torch-export only)"
    )
    tolerance: Above = key(
        1e-4, "largest difference from the student; relative to the largest output if that is above 1", "failures"
    )


class Config(Section):
    """The whole configuration; each stage reads its own sections."""

    prepare: PrepareConfig = PrepareConfig()
    teacher: TeacherConfig = TeacherConfig()
    views: ViewsConfig = ViewsConfig()
    cache: CacheConfig = CacheConfig()
    refine: RefineConfig = RefineConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
