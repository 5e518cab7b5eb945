"""Compile what runs again and again, such as a teacher, or a step of a student from decoding to its loss."""

from collections.abc import Callable
from typing import Generic, Literal, TypeVar

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, OperatorIssue

from pipeline.runtime.progress import say
from singer.errors import UserError

# Graphs of one function: students that share a process have one each, for each share of their patches and size of a
# batch. Beyond the limit torch would go on uncompiled, without a word.
_GRAPHS = 256

# Older versions of torch do not wrap the errors of a backward pass, which is compiled when it is first needed.
_COMPILER_ERRORS = (TorchDynamoException, OperatorIssue, CppCompileError)

T = TypeVar("T")
Model = TypeVar("Model", bound=Callable[..., object])


def any_length(x: Tensor) -> None:
    """Let one graph serve a tensor (n, ...) of nearly any length; short ones may need others."""
    torch._dynamo.maybe_mark_dynamic(x, 0)


class Compilable(Generic[Model]):
    """A model, or any other function of tensors, in two forms: as it is (`plain`) and, if it is to be, compiled.

    wanted: the value of a key of the configuration; if it is "auto", `able` decides, and a compiler that does not work
    is a note, after which the plain model goes on. key: the name of that key, for messages.
    """

    def __init__(self, plain: Model, wanted: bool | Literal["auto"], able: bool, key: str) -> None:
        self.plain, self._required, self._key = plain, wanted is True, key
        self._compiled: Model | None = None
        if able if wanted == "auto" else wanted:
            torch._dynamo.config.cache_size_limit = max(_GRAPHS, torch._dynamo.config.cache_size_limit)
            self._compiled = torch.compile(plain)  # type: ignore[assignment]

    def run(self, compute: Callable[[Model], T]) -> T:
        """Return compute(model); torch compiles when it is first called with a new form of input.

        If the compiler fails, it is called again with the plain model, so it must not keep what it has computed. Raises
        UserError if compilation is required and fails.
        """
        if self._compiled is not None:
            try:
                return compute(self._compiled)
            except _COMPILER_ERRORS as error:
                cause = getattr(error, "inner_exception", error)
                reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
                failure = f"torch.compile does not work here ({reason})"
                if self._required:
                    raise UserError(f"{failure}; do without it: --set {self._key}=false") from error
                say(f"note: {failure}; {self._key} auto goes on without it")
                self._compiled = None
        return compute(self.plain)
