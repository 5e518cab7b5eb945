"""The kinds of values that keys of the configuration have."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from singer.sizes import Size

# YAML reads a bare `no` as false.
Precision = Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)]
Dtype = Literal["float32", "bfloat16", "float16"]
Offload = Literal["none", "cpu", "disk", "auto"]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Below = Annotated[float, Field(gt=0, lt=1)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Rates = tuple[Above, ...]


def _pixels(value: Any) -> Any:
    """Read a size as the command line has it, such as 224x448. Raises an error that says which forms there are."""
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)?", value):
        value = [int(side) for side in value.split("x")] if "x" in value else int(value)
    if isinstance(value, str) or (isinstance(value, list | tuple) and len(value) != 2):
        raise PydanticCustomError("size", "input should be one whole number, or two: [height, width]")
    return value


# The side of a square, or height and width.
InputSize = Annotated[
    Positive | tuple[Positive, Positive], BeforeValidator(_pixels), AfterValidator(lambda size: Size.of(size).written)
]
