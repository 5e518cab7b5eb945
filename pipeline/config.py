"""The configuration: one frozen, validated tree, read at the edge and passed down in parts.

Defaults, then a YAML file, then direct options and `--set section.key=value`. Unknown keys are refused.
"""

import difflib
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from singer.errors import UserError

# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]
Jitter = Annotated[float, Field(ge=0, le=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(Section):
    """A timm VisionTransformer: hub name, `hf-hub:` or `local-dir:` name, or a name with a local weight file."""

    name: str = "vit_base_patch14_dinov2"
    weights: Path | None = Field(None, description="local .safetensors/.pth file; without it timm fetches them")
    image_size: Positive | None = Field(None, description="pixels; default: the teacher's own")


class ViewsConfig(Section):
    """Which crops of an image the teacher and the students see.

    Everything drawn is a pure function of (seed, key of the image, number of the view) and is stored in the index.
    """

    count: Positive = Field(1, description="views an image")
    kind: Literal["center", "random-resized-crop"] = "center"
    crop: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="center: share of the short side that is kept")
    scale: tuple[Fraction, Fraction] = Field(
        (0.08, 1.0), description="random-resized-crop: least and largest share of area"
    )
    ratio: tuple[Ratio, Ratio] = Field((3 / 4, 4 / 3), description="random-resized-crop: width / height")
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of a mirrored view")
    color: tuple[Jitter, Jitter, Jitter, Hue] = Field(
        (0.0, 0.0, 0.0, 0.0), description="largest change of brightness, contrast, saturation; shift of hue in turns"
    )
    seed: Seed = 0
    pixels: Literal["none", "jpeg", "uint8"] = Field("none", description="store the views too, for students")
    pixel_size: Positive | None = Field(None, description="side of the stored views; default: the teacher's input")
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90

    @model_validator(mode="after")
    def _check(self) -> "ViewsConfig":
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{name}: {low} is larger than {high}")
        if self.count > 1 and self.kind == "center" and not self.flip and not any(self.color):
            raise UserError("count: center views are all alike; choose kind random-resized-crop, flip or color")
        return self


class CacheConfig(Section):
    """Which features are stored, and how."""

    blocks: tuple[int, ...] | None = Field(None, description="0-based; default: at 3/4 of the depth and the last")
    codec: str = "float16"
    token_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the patch tokens that is stored, a fixed random set for every record"
    )
    lossless: Literal["none", "zstd", "blosc"] = Field(
        "none", description="compression of every record behind the codec"
    )
    on_error: Literal["fail", "skip"] = Field("fail", description="what to do with broken images and shards")
    batch_size: Positive = 64
    precision: Precision = Field("no", description="autocast of the teacher's forward pass")
    shard_mb: Positive = Field(128, description="target size of a Zarr shard of one block, MB")
    workers: Positive = Field(2, description="image decoding threads")


# Of a student: what belongs to its name.
_SHAPE = ("dim", "depth", "heads", "patch_size")
# What the paper and its authors' code do, where it differs from this project's own way. Keys given beside it win.
_PAPER = {
    "cleaner": "adapter", "normaliser": "none", "rank": 64, "start": "doubled", "quantile": 0.97,
    "outlier_weight": 0.01, "info_weight": 1.0, "keep_weight": 0.0, "weight_decay": 1e-4,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "singer": {},
    "paper": {**_PAPER, "basis": "weights", "outlier_form": "paper", "info_form": "paper"},
    "official": {**_PAPER, "basis": "weights-official", "outlier_form": "official", "info_form": "official"},
}


class RefineConfig(Section):
    """The cleaner of artifacts, its fit on the cache, and the normalisation of the targets after it."""

    variant: Literal["singer", "paper", "official"] = Field(
        "singer", description="sets the keys below as this project, the paper or its authors' code has them"
    )
    cleaner: str = "neighbour"
    normaliser: str = "standardize"
    rank: Positive | Literal["auto"] = Field(
        16, description="adapter: its rank; auto: where artifact energy removed is farthest above drift, for each block"
    )
    basis: str = Field("weights", description="the subspace in which adapters start")
    start: Literal["identity", "doubled"] = Field("identity", description="up = 0, or the paper's up = down transposed")
    softness: Annotated[float, Field(ge=0)] = Field(
        1.0, description="projector: what a change costs where the final norm sees it; 0 is the neighbours' mean"
    )
    threshold_k: Annotated[float, Field(gt=0)] = Field(
        6.0, description="a patch token is an artifact above median + k sigma (robust) of its block's norms"
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(0.97, description="γ of the paper's outlier forms")
    outlier_form: str = "robust"
    info_form: str = "clean"
    outlier_weight: Annotated[float, Field(ge=0)] = 1.0
    info_weight: Annotated[float, Field(ge=0)] = 1.0
    keep_weight: Annotated[float, Field(ge=0)] = 1.0
    steps: Positive = Field(2000, description="at most; fitting ends when it has converged")
    tolerance: Annotated[float, Field(ge=0)] = Field(
        0.02, description="of the loss: less gain than this in 50 steps lowers the rate, and then ends the fit"
    )
    batch_size: Positive = 32
    lr: Annotated[float, Field(gt=0)] = 1e-2
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="share of records kept for the figures")
    statistics_records: Positive = Field(4096, description="records from which thresholds and statistics come")
    sample_records: Positive = Field(512, description="records from which subspaces and curvature come")
    seed: Seed = 0
    teacher: str | None = Field(None, description="which of a cache's teachers, by its variant; default: the first")
    blocks: tuple[int, ...] | None = Field(None, description="which of its blocks; default: all")
    local_copy: Path | None = Field(None, description="folder to which shards are copied when they are first read")

    @model_validator(mode="before")
    @classmethod
    def _of_variant(cls, given: Any) -> Any:
        variant = given.get("variant") if isinstance(given, dict) else None
        return {**VARIANTS[variant], **given} if isinstance(variant, str) and variant in VARIANTS else given


class StudentConfig(Section):
    """Any timm VisionTransformer by name, or `vit` with the dimensions given here."""

    name: str = "vit"
    dim: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    patch_size: Positive | None = None
    image_size: Positive | None = Field(None, description="pixels; default: the teacher's in the cache")
    pretrained: bool = False
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="stochastic depth, rate of the last block")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass, to save memory")


class DistillConfig(Section):
    """The training of a student."""

    objective: str | dict[str, Annotated[float, Field(gt=0)]] = Field(
        "mse", description="a name, or names with weights: {mse: 1, logits: 0.5}"
    )
    projector: str = Field("linear", description="from student to teacher width, at each block; lift: and to its grid")
    joint: bool = Field(False, description="train fresh adapters (section refine) with the student, as the paper does")
    kd_weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="joint: of the objective beside the adapters' losses"
    )
    epochs: Positive = 100
    batch_size: Positive = Field(256, description="records a step over all processes")
    lr: Annotated[float, Field(gt=0)] = 1e-3
    final_lr: Annotated[float, Field(ge=0, le=1)] = Field(1e-4, description="at the end, as a factor of lr")
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(0.5, description="linear; the paper takes 5 of 100")
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    accumulate: Positive = Field(1, description="parts in which a batch goes through the model, to save memory")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay a step of a moving average of the student, which is then what is kept"
    )
    compile: bool = Field(False, description="torch.compile")
    trackers: tuple[str, ...] = Field(
        ("tensorboard",),
        description="of Accelerate: tensorboard, wandb, mlflow ...; log.jsonl is always there",
    )
    precision: Precision = "no"
    workers: Positive = Field(2, description="image decoding and feature reading threads")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0, description="a checkpoint at least this often, and after every epoch"
    )
    read_block: Positive = Field(
        1, description="neighbouring records that are read together; more for small records and disks that seek slowly"
    )
    shuffle_window: Positive = Field(
        16384, description="records within which such blocks are mixed, read in one piece if small"
    )
    seed: Seed = 0
    teacher: str | tuple[str | None, ...] | None = Field(
        None,
        description="which of a cache's teachers, by its variant; default: the adapters', or the first. Of several "
        "caches: a list",
    )
    blocks: tuple[int, ...] | tuple[tuple[int, ...] | None, ...] | None = Field(
        None, description="which of its blocks; default: the adapters', or all. Of several caches: a list of lists"
    )
    teacher_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="of several caches: what each teacher's objective counts; default: equal, 1 in all"
    )
    local_copy: Path | None = Field(None, description="folder to which shards are copied when they are first read")

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs: a warm-up of {self.warmup_epochs:g} of {self.epochs} epochs never reaches the rate; "
                f"give fewer (--set distill.warmup_epochs={0.05 * self.epochs:g}), or more epochs"
            )
        if self.accumulate > self.batch_size:
            raise UserError(f"accumulate: a batch of {self.batch_size} records has no {self.accumulate} parts")
        if self.read_block > self.shuffle_window:
            raise UserError(
                f"read_block: {self.read_block} neighbouring records are more than a shuffle_window of "
                f"{self.shuffle_window}, which would mix nothing else; make the window larger"
            )
        return self

    @property
    def objectives(self) -> dict[str, float]:
        """{name: weight}"""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(self.objective)

    @property
    def teachers(self) -> tuple[str | None, ...] | None:
        """One for each cache; None: no cache's is named."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def blocks_by_teacher(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """One for each cache; None: no cache's are named."""
        if self.blocks is None or not all(isinstance(b, int) for b in self.blocks):
            return cast("tuple[tuple[int, ...] | None, ...] | None", self.blocks)
        return (cast("tuple[int, ...]", self.blocks),)


class EvaluateConfig(Section):
    """Probes of a frozen student."""

    tokens: Literal["block", "norm", "both"] = Field(
        "both", description="raw output of the last block, after the final norm, or both where there is a norm"
    )
    image_size: Positive | None = Field(None, description="pixels; default: the student's own")
    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="but for segmentation and depth: share of the short side kept"
    )
    batch_size: Positive = 128
    workers: Positive = 2
    neighbours: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0),
        min_length=1,
        description="inverse L2 penalties, chosen among on a split of the training shards",
    )
    seg_classes: Annotated[int, Field(ge=2, le=256)] | None = Field(
        None, description="classes of the masks, labels from 0 on; segmentation needs it"
    )
    seg_ignore: Annotated[int, Field(ge=0, le=255)] = Field(255, description="label of pixels that do not count")
    seg_lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-3, 3e-3, 1e-2, 3e-2),
        min_length=1,
        description="learning rates, chosen among on a split of the training shards",
    )
    seg_passes: Positive = Field(50, description="passes over the training images")
    depth_min: Annotated[float, Field(gt=0)] = Field(0.001, description="meters; pixels outside do not count")
    depth_max: Annotated[float, Field(gt=0)] = Field(10.0, description="meters; pixels outside do not count")
    depth_bins: Annotated[int, Field(ge=2)] = Field(256, description="spread evenly over depth_min to depth_max")
    depth_lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-3, 3e-3, 1e-2, 3e-2),
        min_length=1,
        description="learning rates, chosen among on a split of the training shards",
    )
    depth_passes: Positive = Field(50, description="passes over the training images")
    shots: tuple[Positive, Positive] | None = Field(
        (20, 100), description="classification: few-shot classes have fewer training images, many-shot ones more"
    )
    class_map: Path | None = Field(
        None, description='domain-shift, head: JSON {"test label": train label}, or a list of train labels'
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.depth_min >= self.depth_max:
            raise UserError(f"depth_min: {self.depth_min} is not below depth_max, {self.depth_max}")
        if self.shots is not None and self.shots[0] > self.shots[1]:
            raise UserError(f"shots: {self.shots[0]} is larger than {self.shots[1]}")
        return self


class ExportConfig(Section):
    """What a student's export gives."""

    output: Literal["pooled", "tokens"] = Field(
        "pooled", description="timm's forward, or raw output of the last block (onnx and torch-export only)"
    )
    tolerance: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="largest difference from the student; times the largest output where that is above 1"
    )


class PrepareConfig(Section):
    """A folder of images -> WebDataset shards."""

    layout: str = Field("folder", description="how the images lie on disk: a name among pipeline/data/importers/")
    split: str | None = Field(None, description="which split of a layout that has several")
    shard_images: Positive = 1000
    classes: Path | None = Field(None, description="classes.json of another split, to number classes as there")
    on_error: Literal["fail", "skip"] = "fail"
    seed: Seed = 0


class Config(Section):
    """Everything; each stage reads its own sections."""

    prepare: PrepareConfig = PrepareConfig()
    teacher: TeacherConfig = TeacherConfig()
    views: ViewsConfig = ViewsConfig()
    cache: CacheConfig = CacheConfig()
    refine: RefineConfig = RefineConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()


def load_config(
    file: str | Path | Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Config:
    """The resolved configuration.

    file: a YAML file, the name of a bundled recipe, or what such a file holds. sets: `section.key=value` with a YAML
    value. options: {"section.key": value} of direct options; None values are left out.
    Raises UserError naming the key, what is wrong and the nearest valid key.
    """
    base = _sections(file) if isinstance(file, Mapping) else _read(file) if file is not None else {}
    given = {name: value for name, value in (options or {}).items() if value is not None}
    for item in sets:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes section.key=value, not {item!r}")
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {name}: {text!r} is no YAML value") from None
    tree = _without_shape(base, given.get("student.name"))
    for name, value in given.items():
        _put(tree, name, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"configuration: {_explain(first)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that load_config reads back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def resource(name: str) -> Path:
    """Find configs/ or data/...: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / name
    return inside if inside.exists() else here.parent / name


def recipes() -> list[str]:
    return sorted(p.stem for p in resource("configs").glob("*.yaml"))


def _read(file: str | Path) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        bundled = resource("configs") / f"{file}.yaml"
        if not bundled.is_file():
            raise UserError(f"--config {file}: no such file, nor a recipe among {', '.join(recipes())}")
        path = bundled
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {file}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"--config {file}: expected sections with keys, found {type(tree).__name__}")
    return _sections(tree or {})


def _sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Its own, to put more in; an empty section reads as None."""
    return {section: {} if keys is None else copy(keys) for section, keys in tree.items()}


def _without_shape(tree: dict[str, Any], student: str | None) -> dict[str, Any]:
    """The file's tree for another student than its own: the shape that it gives is not this one's."""
    keys = tree.get("student", {})
    if student is None or not isinstance(keys, dict) or keys.get("name", StudentConfig().name) == student:
        return tree
    return {**tree, "student": {key: value for key, value in keys.items() if key not in _SHAPE}}


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    section, dot, key = name.partition(".")
    if not dot:
        raise UserError(f"--set {name}: give section.key, with a section among {', '.join(Config.model_fields)}")
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"configuration: section {section} holds no keys")
    branch[key] = value


def _explain(error: ErrorDetails) -> str:
    # Behind section and key come places in lists, and names of types that a value might also have.
    where = ".".join(str(part) for n, part in enumerate(error["loc"]) if n < 2 or isinstance(part, int))
    if error["type"] == "value_error":  # a section's own check, which names the key
        return f"{where}.{error['ctx']['error']}"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].lower()}, got {error['input']!r}"
    section, _, key = where.rpartition(".")
    fields = Config.model_fields
    if section in fields:
        default: Section = getattr(Config(), section)
        fields = type(default).model_fields
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0)
    return f"unknown key {where!r}; did you mean {'.'.join([*filter(None, [section]), *near])!r}?"
