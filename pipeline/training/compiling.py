"""Compile the step of a student: decoding, refining, the student's forward pass, projection and loss in one graph."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from pipeline.runtime.progress import say
from singer.errors import UserError

T = TypeVar("T")


class StepModel:
    """A model in two forms: as it is, and compiled, if it is to be.

    plain: the model as it is; off: if a compiler that does not work is an error, the option that does without one.
    Otherwise it is a note, and the plain model goes on.
    """

    def __init__(self, plain: nn.Module, compiles: bool, off: str | None = None) -> None:
        self.plain, self._off = plain, off
        self._compiled: Callable[..., object] | None = torch.compile(plain) if compiles else None

    def step(self, compute: Callable[[nn.Module], T]) -> T:
        """Return compute(model); torch compiles when it is first called with a new form of input.

        If the compiler fails, it is called again with the plain model, so it must not keep what it has computed. Raises
        UserError if compilation is required and fails.
        """
        if self._compiled is not None:
            try:
                return compute(self._compiled)  # type: ignore[arg-type]
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
                if self._off is not None:
                    raise UserError(
                        f"torch.compile does not work here ({reason}); train without it: {self._off}"
                    ) from error
                say(f"note: torch.compile does not work here ({reason}); training goes on without it")
                self._compiled = None
        return compute(self.plain)
