"""The section of the configuration that says how a student is fine-tuned with labels."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import check_ranges, key
from pipeline.config.kinds import Above, Fraction, Hue, InputSize, NotNegative, Positive, Share, UserPath
from pipeline.config.training import TrainingConfig
from singer.errors import UserError


class FinetuneConfig(TrainingConfig):
    """Fine-tuning with labels: the student and a head learn classes from new views of the images in every epoch."""

    section: ClassVar[str] = "finetune"

    epochs: Positive = key(50, "passes over the images")
    optimizer: Literal["muon", "adamw"] = key(
        "adamw", "adamw: AdamW for all weights; muon: orthogonal updates of matrices, those of NAdamW for the rest"
    )
    lr: Above = key(5e-4, "peak learning rate, of the head; the last block has layer_decay times it")
    weight_decay: NotNegative = key(0.05, "weight decay; norms, biases, tokens and positions do not decay")
    layer_decay: Fraction = key(
        0.75, "factor of the rate from a block of the student to the one before it; 1 trains all blocks alike"
    )
    read_block: Positive | None = key(1, "neighbouring images that are read together; 1: a plain shuffle")
    head: Literal["probe", "zeros"] = key(
        "probe", "weights that the head starts from: those of a linear probe of the student as it is, or zeros"
    )
    image_size: InputSize | None = key(
        None, "input in pixels, one number or [height, width]; default: the student's own"
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = key(
        None, "stochastic depth: rate of the last block; default: that of the student in stage 3"
    )
    scale: tuple[Fraction, Fraction] = key((0.08, 1.0), "random resized crops: least and largest share of the area")
    ratio: tuple[Above, Above] = key(
        (3 / 4, 4 / 3), "random resized crops: least and largest width / height, as a factor of the input's"
    )
    flip: Share = key(0.5, "probability of a mirrored view")
    color: tuple[Share, Share, Share, Hue] = key(
        (0.0, 0.0, 0.0, 0.0), "largest change of brightness, contrast and saturation; shift of hue in turns"
    )
    randaugment: tuple[Positive, Annotated[float, Field(ge=0, le=10)]] | None = key(
        None,
        "RandAugment: number of operations on a view, and their magnitude, 0 to 10; DeiT: [2, 9]; default: none",
    )
    erasing: Share = key(
        0.0, "random erasing: probability that noise takes the place of a rectangle of the view; DeiT: 0.25"
    )
    mixup: NotNegative = key(0.8, "alpha of Mixup; 0 leaves it out")
    cutmix: NotNegative = key(1.0, "alpha of CutMix; 0 leaves it out")
    mix_prob: Share = key(1.0, "share of the steps whose images are mixed")
    cutmix_prob: Share = key(0.5, "with both: share of CutMix among these steps, the others have Mixup")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "label smoothing: share that all classes get alike")
    kd: Literal["none", "soft", "hard"] = key(
        "none",
        "what a teacher with a head adds to the labels, for the same views: nothing, its class probabilities (soft) "
        "or its first class (hard, as DeiT)",
    )
    kd_weight: Fraction = key(0.5, "kd: the teacher's share of the loss; the labels have the rest")
    kd_temperature: Above = key(1.0, "soft: temperature of both class probabilities; its square multiplies the loss")
    teacher: str | None = key(
        None,
        "kd: the model with a head, as evaluate takes a model; default: the teacher that the run learned from",
        "place",
    )
    class_map: UserPath | None = key(
        None,
        'kd: JSON {"label": class of the teacher\'s head}, or a list of these classes; default: those of the same '
        "name, or, for as many classes, of the same number",
        "place",
    )

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        """Raise UserError if keys do not fit together."""
        check_ranges(self, "scale", "ratio")
        given = [name for name in ("teacher", "class_map") if getattr(self, name) is not None]
        if self.kd == "none" and given:
            raise UserError(f"{given[0]}: no teacher takes part; set finetune.kd=soft (or hard), or leave it out")
        if self.kd == "none" and self.kd_weight != type(self).model_fields["kd_weight"].default:
            raise UserError(
                f"kd_weight: {self.kd_weight:g} is the share of a teacher, and none takes part; set finetune.kd=soft "
                "(or hard), or leave it out"
            )
        if self.kd != "soft" and self.kd_temperature != 1:
            raise UserError(
                f"kd_temperature: {self.kd_temperature:g} is for soft labels; set finetune.kd=soft, or leave it out"
            )
        return self

    @property
    def teacher_path(self) -> Path | None:
        """Return the run or folder that teacher names, if it names one."""
        path = Path(self.teacher or "").expanduser()
        return path if self.teacher is not None and path.exists() else None
