"""The kinds of values that keys of the configuration have."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from singer.errors import UserError
from singer.sizes import Size

Precision = Literal["auto", "no", "bf16", "fp16"]
Dtype = Literal["float32", "bfloat16", "float16"]
Offload = Literal["none", "cpu", "disk", "auto"]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Below = Annotated[float, Field(gt=0, lt=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Rates = tuple[Above, ...]


def _pixels(value: Any) -> Any:
    """Read a size as the command line has it, such as 224x448. Raises an error that says which forms there are."""
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)?", value):
        value = [int(side) for side in value.split("x")] if "x" in value else int(value)
    pair = value if isinstance(value, list | tuple) else [value]
    if len(pair) > 2 or (len(pair) == 1 and isinstance(value, list | tuple)) or any(isinstance(n, str) for n in pair):
        raise PydanticCustomError("size", "input should be a number such as 224, or HEIGHTxWIDTH such as 224x448")
    if any(isinstance(n, int) and n < 1 for n in pair):
        raise PydanticCustomError("size", "input should be 1 or more on each side")
    return value


def _expanded(path: Path) -> Path:
    """Expand `~`, since no shell does that in section.key=~/folder. Raises an error if there is no such home."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise PydanticCustomError("home", "there is no such user, or no home folder") from None


UserPath = Annotated[Path, AfterValidator(_expanded)]
# The side of a square, or height and width.
InputSize = Annotated[
    Positive | tuple[Positive, Positive], BeforeValidator(_pixels), AfterValidator(lambda size: Size.of(size).written)
]
# What keys that limit a LocalCopy mean.
LOCAL_COPY_GB = (
    "what all copies in that folder may take, in GB; those unused for longest are removed first, and none that was "
    "used in the last ten minutes; default: no limit"
)


class LocalCopy(NamedTuple):
    """A folder to which Zarr shards are copied when they are first read, and how many GB they may take (any number)."""

    folder: Path
    gb: float | None = None

    @classmethod
    def of(cls, folder: Path | None, gb: float | None) -> "LocalCopy | None":
        """Return what two keys of a section say. Raises UserError for a limit without a folder."""
        if folder is None:
            if gb is not None:
                raise UserError("local_copy_gb: there is no folder that it limits; set local_copy=FOLDER, too")
            return None
        return cls(folder, gb)
