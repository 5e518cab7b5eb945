"""The sections of the configuration: one frozen, validated tree. Each key states what it is and what it affects."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.distill import DistillConfig
from pipeline.config.fields import Section, check_ranges, key
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.kinds import (
    Above,
    Dtype,
    Fraction,
    Hue,
    InputSize,
    Offload,
    Positive,
    Precision,
    Rates,
    Seed,
    Share,
    UserPath,
)
from pipeline.config.refine import RefineConfig
from pipeline.config.student import StudentConfig
from singer.errors import UserError

# Of an image that is decoded without being asked for: a few bytes can claim gigabytes.
MAX_PIXELS = 100_000_000
# In a forward pass of a teacher.
_VIEWS_AT_ONCE = 64
# These tasks of `evaluate` have one label for each image.
_IMAGES = ("classification", "retrieval", "domain-shift", "head")


class PrepareConfig(Section):
    """A folder of images -> WebDataset shards."""

    layout: str = key("folder", "how the images are stored: a name among pipeline/data/importers/")
    split: str | None = key(None, "which split of a data set that has several")
    shard_images: Positive = key(1000, "images in a shard")
    classes: UserPath | None = key(None, "classes.json of another split, to number classes as there")
    seed: Seed = key(0, "seed of the order of images")


class DataConfig(Section):
    """What is read of images, by every command."""

    on_error: Literal["fail", "skip"] = key("fail", "what to do with broken images and shards", "failures")
    image_key: str | None = key(
        None,
        "which field of a sample is the image, such as left.jpg; .jpg: keys end at this, not at the first dot; of a "
        "table: its column",
    )
    max_pixels: Positive = key(
        MAX_PIXELS, "larger images are broken ones; above 100 million pixels, JPEG is decoded smaller", "failures"
    )


class TeacherConfig(Section):
    """A model of timm (hub name, `hf-hub:` or `local-dir:` name), of transformers (`hf:`), or of one's own."""

    name: str = key(
        "vit_base_patch14_dinov2",
        "the model: a name in timm, hf-hub:USER/NAME, local-dir:FOLDER, hf:USER/NAME or package.module:function",
        "place",
    )
    weights: UserPath | None = key(
        None, "local .safetensors or .pth file; without it timm fetches the weights", "place"
    )
    averaged: bool = key(True, "take averaged weights (EMA) where a file has both")
    image_size: InputSize | None = key(
        None, "input in pixels, one number or [height, width]; default: the teacher's own"
    )
    dtype: Dtype = key("float32", "type of the weights; 16 bits halve their memory (cache.precision only computes so)")
    offload: Offload = key(
        "none",
        "where the blocks are: on the process's device (none), or in memory (cpu) or on disk (disk) until each is "
        "needed; auto spreads them over all GPUs, and what does not fit there over memory and disk",
        "speed",
    )
    copies: Annotated[int, Field(ge=1, le=100)] = key(
        1,
        "passes over each view: itself, and copies that are shifted by whole patches and mirrored; what is stored are "
        "the averages of their features, brought back to their places",
    )


class ViewsConfig(Section):
    """Which crops of an image the teacher and the students see.

    All random choices are a pure function of (seed, key of the image, number of the view), and the index stores them.
    """

    count: Positive = key(1, "views of each image")
    kind: Literal["center", "random-resized-crop"] = key("center", "how a view is cut out")
    shape: InputSize | None = key(
        None, "height : width of a crop, such as [1, 2]; default: that of the teacher's input"
    )
    crop: Fraction = key(1.0, "center: share of the largest crop of the shape; of a square, of the short side")
    scale: tuple[Fraction, Fraction] = key((0.08, 1.0), "random-resized-crop: least and largest share of the area")
    ratio: tuple[Above, Above] = key(
        (3 / 4, 4 / 3), "random-resized-crop: least and largest width / height, as a factor of the shape's"
    )
    flip: Share = key(0.0, "probability of a mirrored view")
    color: tuple[Share, Share, Share, Hue] = key(
        (0.0, 0.0, 0.0, 0.0), "largest change of brightness, contrast and saturation; shift of hue in turns"
    )
    seed: Seed = key(0, "seed of everything that is drawn")
    decoder: Literal["pillow", "torchvision"] = key(
        "pillow",
        "what decodes images and cuts views for the teacher; torchvision: JPEGs on its device (nvJPEG on a GPU), and "
        "other images by Pillow; students and probes always decode by Pillow",
    )
    pixels: Literal["auto", "none", "jpeg", "uint8"] = key(
        "auto",
        "whether the views are stored too, so that students need no images, and decode none; auto: uint8, if features "
        "and views take at most half of the free disk",
        by_machine=True,
    )
    pixel_size: InputSize | None = key(
        None,
        "size of the stored views in pixels, one number or [height, width]; default: the teacher's input",
        part_of="pixels",
    )
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = key(90, "quality of stored JPEGs", part_of="pixels")

    @model_validator(mode="after")
    def _check(self) -> "ViewsConfig":
        """Raise UserError if keys do not fit together."""
        check_ranges(self, "scale", "ratio")
        if self.count > 1 and self.kind == "center" and not self.flip and not any(self.color):
            raise UserError(
                "count: center views are all alike; crop them at random (--set views.kind=random-resized-crop), or set "
                "views.flip or views.color"
            )
        return self


class CacheConfig(Section):
    """Which features are stored, and how."""

    blocks: tuple[int, ...] | None = key(None, "numbers from 0 on; default: the block at 3/4 of the depth and the last")
    codec: str = key("float16", "how features are stored: float16, bfloat16, int8, int4, int3, int2 or int1")
    token_share: Fraction = key(1.0, "share of the patch tokens that is stored, a fixed random set for every record")
    batch_size: Positive | Literal["auto"] = key(
        _VIEWS_AT_ONCE,
        "views in a forward pass of the teacher; auto: on a GPU the size from which on more are no faster, within half "
        "of its free memory",
        by_machine=True,
    )
    precision: Precision = key(
        "auto",
        "autocast of the teacher's forward pass; auto: bf16 on GPUs that compute in it, else no (float32)",
        by_machine=True,
    )
    compile: bool | Literal["auto"] = key(
        "auto", "torch.compile the teacher; auto: on GPUs, where it works and teacher.offload is none"
    )
    shard_mb: Positive = key(128, "target size of a Zarr shard of one block, MB")
    workers: Positive = key(2, "threads that decode images", "speed")

    @property
    def views_at_once(self) -> int:
        """Return batch_size, or its default as long as auto has not been replaced by what was found."""
        return _VIEWS_AT_ONCE if self.batch_size == "auto" else self.batch_size


class EvaluateConfig(Section):
    """Probes of a frozen model."""

    tokens: Literal["block", "norm", "both"] = key(
        "both", "output of the last block: raw (block), after the final norm (norm), or both where there is a norm"
    )
    image_size: InputSize | None = key(
        None, "input in pixels, one number or [height, width]; default: the student's own"
    )
    crop: Fraction = key(
        1.0, "share of the largest crop of the input's shape that is kept; dense tasks keep all", only=_IMAGES
    )
    precision: Precision = key(
        "auto",
        "autocast of the model, whose features are kept and probed in float32; auto: bf16 on GPUs that compute in it, "
        "else no (float32)",
    )
    batch_size: Positive = key(128, "images in a forward pass", "speed")
    workers: Positive = key(2, "threads that decode images", "speed")
    features: UserPath | None = key(
        None,
        "folder that keeps the features of images; probes that were interrupted, or are repeated with other settings, "
        "go on from them",
        "place",
        only=("classification", "retrieval", "domain-shift"),
    )
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
    class_map: UserPath | None = key(
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
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    views: ViewsConfig = ViewsConfig()
    cache: CacheConfig = CacheConfig()
    refine: RefineConfig = RefineConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    def changed(self, **sections: Mapping[str, Any]) -> "Config":
        """Return the configuration with other values, {key: value} of some sections, which are not checked."""
        return self.model_copy(update={n: getattr(self, n).model_copy(update=own) for n, own in sections.items()})
