"""The kinds of values that keys of the configuration have."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

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
