"""Which epoch of a run was the best on held-out images, and whether training ends early."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.config import TrainingConfig
from pipeline.training.fsdp import WholeModel
from singer.lora import with_changes

State = Mapping[str, Tensor]


class Best:
    """The epoch with the lowest loss on held-out images so far, and a copy of the student after it if keep is "best".

    read: returns the states of the student and of all that is trained with it; all processes call it together. An
    object of this class is stored in the checkpoint of the run.
    """

    def __init__(self, settings: TrainingConfig, read: Callable[[], tuple[State, State]]) -> None:
        self._keeps, self._patience = settings.keep == "best", settings.patience
        self._read = read
        self.epoch, self.last, self.loss = 0, 0, math.inf
        self.states: tuple[State, State] | None = None

    @property
    def ended(self) -> bool:
        """Return whether training is to end."""
        return self._patience is not None and self.last - self.epoch >= self._patience

    def record(self, epoch: int, loss: float) -> None:
        """Note the loss after an epoch, and keep the student if it is the lowest."""
        self.last = epoch
        if loss < self.loss:
            self.epoch, self.loss = epoch, loss
            if self._keeps:
                student, trained = self._read()
                self.states = _copied(student), _copied(trained)

    def state_dict(self) -> dict[str, Any]:
        """Return all state."""
        return {"epoch": self.epoch, "last": self.last, "loss": self.loss, "states": self.states}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore what state_dict returned."""
        self.epoch, self.last, self.loss, self.states = (state[name] for name in ("epoch", "last", "loss", "states"))


def whole_states(student: nn.Module, learner: nn.Module) -> tuple[State, State]:
    """Return the states of a student, or of its moving average, and of what is trained with it.

    Changes of low rank are part of the student's matrices. All processes call it together.
    """
    own, whole = WholeModel(student).state_dict(), WholeModel(learner).state_dict()
    return with_changes(own), {name: x for name, x in whole.items() if not name.startswith("student.")}


def _copied(state: State) -> dict[str, Tensor]:
    """Copy a state, whose tensors may be those in training."""
    return {name: tensor.clone() for name, tensor in state.items()}
