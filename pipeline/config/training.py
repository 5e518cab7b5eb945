"""The keys that every training of a student has, whatever its losses are."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Section, key
from pipeline.config.kinds import Above, Below, Fraction, NotNegative, Positive, Precision, Seed, Share
from singer.errors import UserError


class TrainingConfig(Section):
    """The training of a student: its steps and rates, what is held out, and how it is kept and told.

    section: its name, for messages.
    """

    section: ClassVar[str]

    epochs: Positive = key(100, "passes over the data", shared=True)
    batch_size: Positive = key(256, "records in a step, over all processes", shared=True)
    optimizer: Literal["muon", "adamw"] = key(
        "muon", "muon: orthogonal updates of matrices, those of NAdamW for the rest; adamw: AdamW for all weights"
    )
    lr: Above | Literal["auto"] = key(
        "auto",
        "peak learning rate; auto: 4e-3 for students up to 96 wide, for wider ones 4e-3 · 96 / width (adamw), or times "
        "the root of 96 / width (muon)",
    )
    final_lr: Share = key(1e-4, "learning rate at the end, as a factor of lr")
    weight_decay: NotNegative = key(1e-4, "weight decay; norms, biases, tokens and positions do not decay")
    layer_decay: Fraction | Literal["auto"] = key(
        "auto",
        "factor of the rate from a block of the student to the one before it; below 1, a start is changed less; auto: "
        "for students that start as some of the teacher's blocks with all their channels 0.7, or 0.7 ** (4 / blocks) "
        "if they have more than four, else 1",
    )
    warmup_epochs: NotNegative = key(0.5, "epochs of linear warm-up")
    holdout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0,
        "share of the images that are not trained on; log.jsonl has their loss and other figures after each epoch",
        shared=True,
    )
    keep: Literal["last", "best"] = key(
        "last", "the student that is stored: the last, or that of the epoch with the lowest loss on held-out images"
    )
    patience: Positive | None = key(
        None, "training ends after so many epochs without a lower loss on held-out images; default: it does not"
    )
    clip_grad: Above | None = key(None, "largest norm of the gradient")
    accumulate: Positive = key(1, "parts in which a batch goes through the model, to save memory")
    ema: Below | None = key(None, "decay per step of a moving average of the student; the average is then the result")
    compile: bool | Literal["auto"] = key("auto", "torch.compile a whole step; auto: on GPUs, where it works")
    trackers: tuple[str, ...] = key(
        ("tensorboard",), "trackers of Accelerate: tensorboard, wandb, mlflow ...; log.jsonl is always written", "place"
    )
    precision: Precision = key(
        "auto",
        "mixed precision of training; auto: bf16 on GPUs that compute in it, else no (float32)",
        shared=True,
        by_machine=True,
    )
    workers: Positive = key(2, "threads that decode images and read features", "speed", shared=True)
    checkpoint_minutes: Above = key(
        10.0,
        "minutes from one checkpoint to the next, which is made at a step that is logged, one in 50; there is also one "
        "after every epoch",
        "speed",
    )
    read_block: Positive | None = key(
        None,
        "neighbouring records that are read together; 1: a plain shuffle; default: a 512th of the window",
        shared=True,
    )
    shuffle_window: Positive | None = key(
        None,
        "records within which blocks are mixed; a small window is read in one piece; default: the whole batches that "
        "256 MB of features hold; a plain shuffle if these are fewer than 4 batches",
        shared=True,
    )
    seed: Seed = key(0, "seed of the weights that are drawn, and of the order of records", shared=True)

    @model_validator(mode="after")
    def _check_training(self) -> "TrainingConfig":
        """Raise UserError if keys do not fit together."""
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"warmup_epochs: a warm-up of {self.warmup_epochs:g} of {self.epochs} epochs never reaches the rate; "
                f"give fewer (--set {self.section}.warmup_epochs={0.05 * self.epochs:g}), or more epochs"
            )
        if not self.holdout and (self.keep == "best" or self.patience is not None):
            given = "keep: best" if self.keep == "best" else f"patience: {self.patience}"
            raise UserError(
                f"{given} is about the loss on held-out images; hold some out (--set {self.section}.holdout=0.02)"
            )
        if self.accumulate > self.batch_size:
            raise UserError(f"accumulate: a batch of {self.batch_size} records cannot have {self.accumulate} parts")
        if self.read_block and self.shuffle_window and self.read_block > self.shuffle_window:
            raise UserError(
                f"read_block: {self.read_block} neighbouring records are more than a shuffle_window of "
                f"{self.shuffle_window}, which would mix nothing else; make the window larger"
            )
        return self
