"""The section of the configuration that says which model is trained, and what it starts from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Section, key
from pipeline.config.kinds import Above, InputSize, Positive
from singer.errors import UserError

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
    lora: Positive | None = key(
        None,
        "rank: matrices of the blocks keep the weights that they start from, and a change of this rank is trained for "
        "each, beside all other weights (LoRA); default: all weights are trained",
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
        if self.init_blocks != "first" and (self.init == "random" or (self.init == "auto" and self.pretrained)):
            raise UserError(
                f"init_blocks: {self.init_blocks} chooses among blocks of another model, and the student starts from "
                "none; leave it out"
            )
        if self.lora is not None and self.init == "random" and not self.pretrained:
            raise UserError(
                "lora: random weights (init) are not worth keeping; start from others (--set student.init=teacher), or "
                "do without it (--set student.lora=null)"
            )
        if self.lora is not None and self.exit != "plain":
            raise UserError(
                f"lora: a {self.exit} exit starts from random weights, which would be kept; do without lora (--set "
                "student.lora=null)"
            )
        return self
