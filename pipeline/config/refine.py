"""The section of the configuration that says how refiners are fitted."""

from typing import Any, Literal

from pydantic import model_validator

from pipeline.config.fields import Section, key
from pipeline.config.kinds import (
    LOCAL_COPY_GB,
    Above,
    Below,
    LocalCopy,
    NotNegative,
    Positive,
    Seed,
    UserPath,
)

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
